// Answers requests with llama.cpp: node llama_cpp.mjs MODULE MODEL.gguf [LORA.gguf] < requests.json
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [module, modelPath, lora] = process.argv.slice(2);
const { getLlama } = await import(pathToFileURL(module + "/dist/index.js"));
const llama = await getLlama({ build: "never", gpu: false, logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({
    contextSize: 512, batchSize: 512, threads: 2, sequences: 1, ...(lora ? { lora: { adapters: [{ filePath: lora, scale: 1 }] } } : {}),
});
const sequence = context.getSequence();
const answers = [];
for (const request of JSON.parse(readFileSync(0, "utf8"))) {
    await sequence.clearHistory();
    if (request.answer === undefined) {
        const ids = [];
        const { temperature = 0, topP = 1, seed } = request;
        for await (const token of sequence.evaluate(request.tokens, { temperature, topP, topK: 0, seed })) {
            ids.push(Number(token));
            if (request.stream) process.stdout.write(model.detokenize([token]));
            if (ids.length === request.count) break;
        }
        answers.push(ids);
    } else {
        const all = [...request.tokens, ...request.answer];
        const first = request.tokens.length - 1;
        const input = all.map((token, at) => (at >= first && at < all.length - 1 ? [token, { generateNext: { probabilities: true } }] : token));
        const outputs = await sequence.controlledEvaluate(input);
        answers.push(request.answer.map((token, i) => Math.log(outputs[first + i].next.probabilities.get(token) ?? 1e-30)));
    }
}
console.log("\n" + JSON.stringify(answers));
process.exit(0);
