"use strict";
// Draws the curves. Everything else of the page is there without it.

const runs = JSON.parse(document.getElementById("data").textContent).runs;
const SVG = document.querySelector(".chart > svg").namespaceURI;
const shown = runs.map(() => true);
const view = { from: null, to: null }; // the steps in sight; null is all of them
let hover = null; // the step under the pointer

const EVAL = runs.length === 1 ? "var(--run-1)" : null; // of one run, a colour of its own
const KINDS = {
  loss: { format: fixed },
  lr: { format: (v) => (v === 0 ? "0" : v.toExponential(2).replace(/\.?0+e/, "e")), fromZero: true },
  grad_norm: { format: fixed },
  speed: { format: (v) => (v >= 100 ? Math.round(v).toLocaleString("en") : fixed(v)), fromZero: true },
  memory: { format: memory, fromZero: true, unit: 1024 },
};

function fixed(v) {
  const size = Math.abs(v);
  if (size === 0) return "0";
  if ( (size < 1e-3 || size >= 1e6)) return v.toExponential(2);
  return v.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4);
}

function memory(v) {
  if (v === 0) return "0";
  const power = Math.min(3, Math.max(0, Math.floor(Math.log2(Math.max(v, 1)) / 10)));
  const number = v / 1024 ** power;
  return `${number.toFixed(number >= 100 ? 0 : number >= 10 ? 1 : 2).replace(/\.0+$/, "")} ${["B", "KiB", "MiB", "GiB"][power]}`;
}

/// An SVG element.
function make(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (parent) parent.append(element);
  return element;
}

/// The lines of a chart: label, colour, style and points.
function linesOf(kind) {
  const all = [];
  runs.forEach((run, index) => {
    if (!shown[index]) return;
    const color = `var(--run-${index % 8})`;
    const name = runs.length > 1 ? run.name : "";
    const add = (what, curve, style, own) => {
      if (curve.x.length === 0) return;
      const label = [name, what].filter(Boolean).join(", ") || "value";
      all.push({ label, what, curve, style, color: own || color });
    };
    if (kind !== "loss") return add("", run[kind], "strong");
    add("training", run.loss, run.smooth.x.length ? "faint" : "strong");
    add("smoothed", run.smooth, "strong");
    add("evaluation", run.eval, "dashed", EVAL);
  });
  return all;
}

/// The first index whose step is not below `step`.
function indexAt(x, step) {
  let low = 0, high = x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < step) low = middle + 1; else high = middle;
  }
  return low;
}

/// The point of a curve that is nearest to a step.
function nearest(curve, step) {
  const after = indexAt(curve.x, step), before = after - 1;
  if (before < 0) return after;
  if (after >= curve.x.length) return before;
  return step - curve.x[before] <= curve.x[after] - step ? before : after;
}

/// Round numbers between two others.
function ticks(low, high, count, unit = 10) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count;
  let base = 1;
  if (unit === 1024) base = 1024 ** Math.floor(Math.log2(high) / 10);
  const power = base * 10 ** Math.floor(Math.log10(rough / base));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * (1 - 1e-9));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) && found.length < 50; i++) found.push(i * step);
  return found;
}

/// Powers of ten, with what lies between where there are few.
function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
    for (const f of [1, 2, 5]) found.push(f * 10 ** e);
  const inside = found.filter((v) => v >= low && v <= high);
  const tens = inside.filter((v) => Math.abs(Math.log10(v) % 1) < 1e-9);
  return tens.length > 3 ? tens : inside.length ? inside : [low, high];
}

/// Steps from the first to the last of all runs that are shown.
function allSteps() {
  let from = Infinity, to = -Infinity;
  runs.forEach((run, index) => {
    if (!shown[index]) return;
    for (const { x } of [run.loss, run.eval]) if (x.length) {
      from = Math.min(from, x[0]);
      to = Math.max(to, x[x.length - 1]);
    }
  });
  return to >= from ? [from, to] : [0, 1];
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.kind = figure.dataset.curve;
    this.log = false;
    this.svg = figure.querySelector(":scope > svg");
    this.tip = figure.querySelector(".tip");
    this.button = figure.querySelector("button");
    this.button.onclick = () => {
      this.log = !this.log;
      this.button.setAttribute("aria-pressed", this.log);
      this.draw();
    };
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  listen() {
    const { svg } = this;
    let start = null;
    svg.onpointerdown = (event) => {
      if (event.button !== 0) return;
      start = this.place(event);
      svg.setPointerCapture(event.pointerId);
    };
    svg.onpointermove = (event) => {
      const x = this.place(event);
      hoverAt(this.stepAt(x), this);
      if (start !== null) this.choose(start, x);
    };
    svg.onpointerup = (event) => {
      const x = this.place(event);
      if (start !== null && Math.abs(x - start) > 6) {
        const steps = [this.stepAt(start), this.stepAt(x)].sort((a, b) => a - b);
        zoom(Math.floor(steps[0]), Math.ceil(steps[1]));
      }
      start = null;
      this.choose();
    };
    svg.onpointercancel = () => { start = null; this.choose(); };
    svg.onpointerleave = () => { if (start === null) hoverAt(null); };
    svg.ondblclick = () => zoom(null, null);
    svg.onkeydown = (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") zoom(null, null);
      if (!way) return;
      event.preventDefault();
      const step = Math.max(1, Math.round((this.to - this.from) / 100));
      hoverAt(Math.min(this.to, Math.max(this.from, (hover ?? this.from) + way * step)), this);
    };
    svg.onblur = () => hoverAt(null);
  }

  /// Where the pointer is, inside of the axes.
  place(event) {
    const x = event.clientX - this.svg.getBoundingClientRect().left;
    return Math.min(this.right, Math.max(this.left, x));
  }
  stepAt(x) { return this.from + ((x - this.left) / (this.right - this.left)) * (this.to - this.from); }
  x(step) {
    const share = this.to > this.from ? (step - this.from) / (this.to - this.from) : 0.5;
    return this.left + share * (this.right - this.left);
  }
  y(value) {
    const scale = this.log ? Math.log10 : (v) => v;
    const [low, high] = [scale(this.low), scale(this.high)];
    return this.bottom - ((scale(value) - low) / (high - low)) * (this.bottom - this.top);
  }

  /// The part of a curve in sight, with a point beyond each end.
  inSight(curve) {
    const start = Math.max(0, indexAt(curve.x, this.from) - 1);
    const end = Math.min(curve.x.length, indexAt(curve.x, this.to + 1e-9) + 1);
    const points = [];
    for (let i = start; i < end; i++) if (!this.log || curve.y[i] > 0) points.push([curve.x[i], curve.y[i]]);
    return points;
  }

  /// Least and greatest value in sight.
  scale(lines) {
    let low = Infinity, high = -Infinity;
    for (const line of lines) for (const [x, y] of line.points) {
      if (x < this.from || x > this.to) continue;
      low = Math.min(low, y);
      high = Math.max(high, y);
    }
    if (!(high >= low)) return false;
    if (this.log) {
      const room = high > low ? (high / low) ** 0.05 : 1.2;
      [this.low, this.high] = [low / room, high * room];
      return true;
    }
    const { fromZero } = KINDS[this.kind];
    if (fromZero && low >= 0) low = 0;
    const room = (high > low ? high - low : Math.abs(high) || 1) * 0.06;
    [this.low, this.high] = [fromZero && low === 0 ? 0 : low - room, high + room];
    return true;
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width) return;
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const [from, to] = allSteps();
    this.from = view.from ?? from;
    this.to = view.to ?? to;
    Object.assign(this, { left: 58, right: width - 10, top: 8, bottom: height - 24 });
    this.lines = linesOf(this.kind);
    for (const line of this.lines) line.points = this.inSight(line.curve);
    this.keys();
    this.known = this.scale(this.lines);
    if (!this.known) {
      const text = make("text", { class: "none", x: width / 2, y: height / 2 }, this.svg);
      text.textContent = this.log && this.lines.length ? "nothing above 0" : "nothing was measured";
      return;
    }
    this.axes();
    this.paths();
    this.cross = make("g", {}, this.svg);
    this.chosen = make("rect", { class: "chosen", y: this.top, height: this.bottom - this.top, visibility: "hidden" }, this.svg);
    this.point();
  }

  axes() {
    const { svg, left, right, bottom } = this;
    const { format, unit } = KINDS[this.kind];
    const tall = Math.max(2, Math.floor((bottom - this.top) / 36));
    const rules = this.log ? logTicks(this.low, this.high) : ticks(this.low, this.high, tall, unit);
    for (const value of rules) {
      const y = this.y(value);
      make("line", { class: "rule", x1: left, x2: right, y1: y, y2: y }, svg);
      make("text", { x: left - 7, y: y + 4, "text-anchor": "end" }, svg).textContent =
        this.kind === "loss" || this.kind === "grad_norm" ? shortest(value, rules) : format(value);
    }
    const wide = Math.max(2, Math.floor((right - left) / 90));
    const steps = ticks(this.from, this.to, wide).filter((s) => Number.isInteger(s) && s >= this.from);
    for (const step of steps.length ? steps : [this.from])
      make("text", { x: this.x(step), y: bottom + 17, "text-anchor": "middle" }, svg).textContent = step.toLocaleString("en");
  }

  paths() {
    const { svg, left, right, top, bottom } = this;
    const id = `clip-${this.kind}`;
    make("rect", { x: left, y: top - 4, width: right - left + 4, height: bottom - top + 5 }, make("clipPath", { id }, svg));
    const inside = make("g", { "clip-path": `url(#${id})` }, svg);
    const marks = runs.flatMap((run, index) => (shown[index] ? run.marks : []));
    const inSight = marks.filter(([step]) => step >= this.from && step <= this.to);
    const end = inSight.length > 30 ? top + 7 : bottom; // many lines would hide the curve
    for (const [step, why] of inSight)
      make("line", { class: `mark ${why}`, x1: this.x(step), x2: this.x(step), y1: top, y2: end }, inside);
    for (const { points, style, color } of this.lines) {
      const d = points.map(([x, y], i) => `${i ? "L" : "M"}${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("");
      make("path", { class: style, d, style: `--c:${color}` }, inside);
      if (points.length > 1 && (style !== "dashed" || points.length > 200)) continue;
      for (const [x, y] of points) make("circle", { cx: this.x(x), cy: this.y(y), r: 3, style: `--c:${color}` }, inside);
    }
  }

  /// What the lines of the loss are, and the marks; the legend above tells runs apart.
  keys() {
    if (this.kind !== "loss") return;
    const lines = runs.length > 1 ? [] : this.lines;
    const whys = new Set(runs.flatMap((run, index) => (shown[index] ? run.marks.map(([, why]) => why) : [])));
    const marks = [...whys].map((why) => ({ what: why, style: `mark ${why}` }));
    const all = [...(lines.length > 1 ? lines : []), ...marks];
    this.figure.querySelector(".keys").replaceChildren(...all.map(({ what, style, color }) => {
      const key = document.createElement("span");
      const svg = make("svg", { viewBox: "0 0 18 8" });
      make("path", { class: style, d: color ? "M0 4H18" : "M9 0V8", style: `--c:${color}` }, svg);
      key.append(svg, what);
      return key;
    }));
  }

  choose(start, end) {
    if (!this.chosen) return;
    this.chosen.setAttribute("visibility", start === undefined ? "hidden" : "visible");
    if (start === undefined) return;
    this.chosen.setAttribute("x", Math.min(start, end));
    this.chosen.setAttribute("width", Math.abs(end - start));
  }

  /// Draws the step under the pointer; the chart that has the pointer tells the values.
  point(isHere = false) {
    if (!this.known) return;
    this.cross.replaceChildren();
    this.tip.hidden = true;
    if (hover === null || hover < this.from || hover > this.to) return;
    const main = this.lines.filter((line) => line.what !== "evaluation");
    const steps = (main.length ? main : this.lines).map(({ curve }) => curve.x[nearest(curve, hover)]);
    const step = steps.reduce((a, b) => (Math.abs(b - hover) < Math.abs(a - hover) ? b : a), Infinity);
    if (step < this.from || step > this.to) return;
    const x = this.x(step);
    make("line", { class: "cross", x1: x, x2: x, y1: this.top, y2: this.bottom }, this.cross);
    const rows = [];
    for (const { label, what, curve, color } of this.lines) {
      const i = nearest(curve, step), at = curve.x[i], value = curve.y[i];
      const far = Math.abs(at - step) > (this.to - this.from) * 0.03;
      if (far || (this.log && value <= 0)) continue;
      if (at >= this.from && at <= this.to)
        make("circle", { class: "here", cx: this.x(at), cy: this.y(value), r: 4, style: `--c:${color}` }, this.cross);
      const where = what === "evaluation" && at !== step ? `${label} (step ${at.toLocaleString("en")})` : label;
      rows.push([color, where, KINDS[this.kind].format(value)]);
    }
    runs.forEach((run, index) => {
      for (const [at, why] of shown[index] ? run.marks : [])
        if (at === step) rows.push([null, runs.length > 1 ? `${run.name}: ${why}` : why, ""]);
    });
    if (isHere) this.tell(x, step, rows);
  }

  tell(x, step, rows) {
    const line = ([color, label, value]) => {
      const row = document.createElement("div");
      const swatch = document.createElement("i");
      swatch.className = "swatch";
      swatch.style.setProperty("--c", color || "transparent");
      const [name, number] = [document.createElement("span"), document.createElement("b")];
      [name.textContent, number.textContent] = [label, value];
      row.append(swatch, name, number);
      return row;
    };
    const title = document.createElement("div");
    title.textContent = `step ${step.toLocaleString("en")}`;
    this.tip.replaceChildren(title, ...rows.map(line));
    this.tip.hidden = false;
    const across = this.svg.offsetLeft ?? 0;
    const side = x > (this.left + this.right) / 2 ? x - this.tip.offsetWidth - 14 : x + 14;
    this.tip.style.left = `${Math.max(4, side + across + 12)}px`;
    this.tip.style.top = `${this.figure.offsetHeight - this.svg.getBoundingClientRect().height + 4}px`;
  }
}

/// A tick in as few digits as tell it from the next.
function shortest(value, all) {
  const gap = all.length > 1 ? Math.abs(all[1] - all[0]) : Math.abs(value) || 1;
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4)) return value.toExponential(0);
  const digits = Math.max(0, Math.ceil(-Math.log10(Math.min(gap, Math.abs(value) || gap)) - 1e-9));
  return value.toFixed(Math.min(digits, 6));
}

const charts = [...document.querySelectorAll(".chart")].map((figure) => new Chart(figure));
const reset = document.getElementById("reset");
reset.onclick = () => zoom(null, null);

function zoom(from, to) {
  [view.from, view.to] = from !== null && to > from ? [from, to] : [null, null];
  const all = view.from === null;
  reset.disabled = all;
  document.getElementById("view").textContent = all ? "drag over a curve to zoom" :
    `steps ${view.from.toLocaleString("en")} to ${view.to.toLocaleString("en")}`;
  charts.forEach((chart) => chart.draw());
}

function hoverAt(step, here) {
  hover = step;
  charts.forEach((chart) => chart.point(chart === here));
}

document.querySelectorAll(".legend button").forEach((button, index) => {
  button.onclick = () => {
    shown[index] = !shown[index];
    button.setAttribute("aria-pressed", shown[index]);
    zoom(view.from, view.to);
  };
});
zoom(null, null);
