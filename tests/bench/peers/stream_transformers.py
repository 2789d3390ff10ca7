"""transformers' own way to stream one answer: python stream_transformers.py MODEL QUESTION TOKENS [--adapter DIR] [--nf4]; greedy."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TextStreamer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("question")
parser.add_argument("tokens", type=int)
parser.add_argument("--adapter")
parser.add_argument("--nf4", action="store_true")
args = parser.parse_args()
cuda = torch.cuda.is_available()
dtype = torch.bfloat16 if cuda else torch.float32
options = {"dtype": dtype, "device_map": {"": 0} if cuda else None}
if args.nf4:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, **options)
if args.adapter:
    from peft import PeftModel

    model = PeftModel.from_pretrained(model, args.adapter)
turns = [{"role": "user", "content": args.question}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
model.generate(
    **inputs, max_new_tokens=args.tokens, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
)
