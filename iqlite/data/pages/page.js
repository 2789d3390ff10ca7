"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const detail = document.getElementById("detail");
  const BY = ["described", "trained", "reward"];
  const NAMES = ["What the description rewards", "What training changed", "Reward of a training step now"];
  const signed = (x) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(2);
  const share = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 0.00095 ? (100 * p).toFixed(1) : "<0.1") + " %";
  const make = (tag, text, where) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; where.append(e); return e; };
  const seen = (text) => { const s = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥"); return s.trim() === "" ? "␣".repeat(Math.max(1, s.length)) : s; };

  // Tokens: one tab stop an answer, arrows inside; hover, touch and focus show the detail.
  let shown = null;
  function hide() { if (shown) shown.classList.remove("on"); shown = null; detail.hidden = true; }
  function show(token) {
    if (shown === token) return;
    hide();
    const [text, values, contrast, flags, mine, tops] = data.answers[token.parentNode.dataset.answer][token.dataset.n];
    detail.replaceChildren();
    make("strong", "“" + seen(text) + "”", detail);
    const list = make("dl", undefined, detail);
    const row = (name, value) => { make("dt", name, list); make("dd", value, list); };
    NAMES.forEach((name, n) => { if (n === 0 || data.adapted) row(name, signed(values[n])); });
    row("Contrast Δ of the two descriptions", signed(contrast));
    if (flags & 1) make("div", "Clipped: more contrast than superior.clip counts.", detail);
    if (flags & 2) make("div", "Implausible for the base: its contrast counts as 0.", detail);
    const table = make("table", undefined, detail), head = make("tr", undefined, make("thead", undefined, table)), body = make("tbody", undefined, table);
    const roles = data.adapted ? [["The target", 2], ["The base", 1], ["Trained", 0]] : [["The target", 2], ["The base", 1]];
    roles.forEach(([name]) => make("th", name + " would say", head).setAttribute("scope", "col"));
    const own = make("tr", undefined, body);
    roles.forEach(([, r]) => make("td", seen(text) + "  " + share(mine[r]), own));
    for (let n = 0; n < tops[0].length; n++) {
      const line = make("tr", undefined, body);
      roles.forEach(([, r]) => make("td", seen(tops[r][n][0]) + "  " + share(tops[r][n][1]), line));
    }
    detail.hidden = false;
    token.classList.add("on");
    shown = token;
    if (matchMedia("(min-width: 46.01rem)").matches) {
      const at = token.getClientRects()[0], box = detail.getBoundingClientRect();
      detail.style.left = Math.max(8, Math.min(at.left, innerWidth - box.width - 12)) + "px";
      const below = at.bottom + 8;
      detail.style.top = (below + box.height < innerHeight ? below : Math.max(8, at.top - box.height - 8)) + "px";
    } else { detail.style.left = ""; detail.style.top = ""; }
  }
  document.querySelectorAll(".tokens").forEach((answer) => {
    const tokens = [...answer.querySelectorAll(".t")];
    const go = (n) => { const to = tokens[Math.max(0, Math.min(tokens.length - 1, n))]; tokens.forEach((t) => { t.tabIndex = t === to ? 0 : -1; }); to.focus(); };
    answer.addEventListener("keydown", (event) => {
      const n = tokens.indexOf(event.target);
      const to = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (to !== undefined && n >= 0) { event.preventDefault(); go(to); }
    });
    answer.addEventListener("focusin", (event) => { if (event.target.matches(".t")) show(event.target); });
    answer.addEventListener("pointerover", (event) => { if (event.target.matches(".t")) show(event.target); });
    answer.addEventListener("click", (event) => { if (event.target.matches(".t")) go(tokens.indexOf(event.target)); });
    answer.addEventListener("pointerleave", () => { if (!answer.contains(document.activeElement)) hide(); });
    answer.addEventListener("focusout", hide);
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", () => { if (shown && shown !== document.activeElement) hide(); }, { passive: true });

  // What the colours are of: of all answers on the page, wherever that was chosen.
  const radios = document.querySelectorAll(".by input");
  radios.forEach((radio) => radio.addEventListener("change", () => {
    const by = BY.indexOf(radio.value);
    radios.forEach((other) => { other.checked = other.value === radio.value; });
    document.querySelectorAll(".tokens").forEach((answer) => answer.querySelectorAll(".t").forEach((token) => {
      const value = data.answers[answer.dataset.answer][token.dataset.n][1][by], part = Math.min(1, Math.abs(value) / data.most[by]);
      token.className = "t" + (part < 0.1 ? "" : " " + (value < 0 ? "n" : "p") + Math.min(4, 1 + Math.floor(4 * part)));
    }));
    document.querySelectorAll("[data-means]").forEach((e) => { e.textContent = "mean " + signed(JSON.parse(e.dataset.means)[by]); });
  }));

  // Curves: values by pointer and by arrow keys.
  document.querySelectorAll(".plot").forEach((plot) => {
    const chart = data.charts[plot.dataset.chart], svg = plot.querySelector("svg"), cursor = svg.querySelector(".cursor");
    const figure = plot.closest("figure"), values = [...figure.querySelectorAll(".readout [data-value]")], at = figure.querySelector("[data-step]");
    const [x0, x1, left, right] = chart.frame;
    const steps = [...new Set(chart.lines.flatMap((line) => line.map((p) => p[0])))].sort((a, b) => a - b);
    let n = steps.length - 1;
    const point = (to, move) => {
      n = Math.max(0, Math.min(steps.length - 1, to));
      const x = left + (x1 > x0 ? (steps[n] - x0) / (x1 - x0) : 0.5) * (right - left);
      if (move) { cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.setAttribute("visibility", "visible"); }
      at.textContent = plot.dataset.unit + " " + steps[n].toLocaleString("en");
      chart.lines.forEach((line, i) => { let y = null; for (const p of line) if (p[0] <= steps[n]) y = p[1]; values[i].textContent = y === null ? "–" : +y.toPrecision(4); });
    };
    plot.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const step = x0 + (x - left) / (right - left) * (x1 - x0);
      let best = 0;
      steps.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(steps[best] - step)) best = i; });
      point(best, true);
    });
    plot.addEventListener("keydown", (event) => {
      const to = { ArrowRight: n + 1, ArrowLeft: n - 1, Home: 0, End: steps.length - 1 }[event.key];
      if (to !== undefined) { event.preventDefault(); point(to, true); }
    });
  });
})();
