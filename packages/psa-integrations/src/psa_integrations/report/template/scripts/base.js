// What all parts share: the data, what is chosen, and small helpers.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const still = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  prompt: 0, frame: 0, playing: false, speed: 1, amplify: 4,
  run: 1, transformer: "transformer", layer: 0, step: 0, head: 0,
  patch: { t: 0, y: 0, x: 0 }, mode: "levels", tint: 0.75, cell: null,
};
const runs = () => data.prompts[state.prompt].runs;
const numFrames = () => data.shown[state.prompt][0].frames.length;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits));
const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
const seconds = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)) + " s";
const decibel = (value) => (value === null ? "equal" : `${value.toFixed(2)} dB`);
/** A name within a sentence, whose direction of writing it leaves alone. */
const isolate = (text) => `\u2068${text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "")}\u2069`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function rgb(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

/** Sizes a canvas's bitmap to how large it is shown, and returns its context in CSS pixels. */
function fit(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  return context;
}

function showTip(event, text) {
  const tip = $("tip");
  if (!text) { tip.hidden = true; return; }
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${clamp(event.clientX + 14, 4, Math.max(4, innerWidth - width - 4))}px`;
  tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
}

function tipOn(element, textAt) {
  element.addEventListener("pointermove", (event) => showTip(event, textAt(event)));
  element.addEventListener("pointerleave", (event) => showTip(event, ""));
}

/** The run's mark in legends: its colour, its dash and its marker, so that colour is never all. */
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const MARKERS = ["circle", "square", "triangle", "diamond"];
function styleOf(run) {
  if (run === 0) return { colour: "var(--soft)", dash: "", marker: "none" };
  // Six colours and four shapes come round together after twelve; shifted then, all differ up to 24.
  const shape = (run - 1 + Math.floor((run - 1) / 12)) % 4;
  return { colour: `var(--s${(run - 1) % 6})`, dash: DASHES[shape], marker: MARKERS[shape] };
}

function marker(kind, x, y, colour, size = 3.6) {
  const shapes = {
    circle: () => makeSvg("circle", { cx: x, cy: y, r: size }),
    square: () => makeSvg("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size }),
    triangle: () => makeSvg("polygon", { points: `${x},${y - size - 1} ${x - size - 1},${y + size} ${x + size + 1},${y + size}` }),
    diamond: () => makeSvg("polygon", { points: `${x},${y - size - 1} ${x + size + 1},${y} ${x},${y + size + 1} ${x - size - 1},${y}` }),
    none: () => makeSvg("g"),
  };
  const shape = shapes[kind]();
  shape.setAttribute("class", "mark");
  shape.setAttribute("stroke", colour);
  return shape;
}

function keyOf(run) {
  const { colour, dash, marker: kind } = styleOf(run);
  const line = makeSvg("path", { d: "M0 6H26", stroke: colour, "stroke-width": 2, "stroke-dasharray": dash });
  return makeSvg("svg", { class: "key chart", viewBox: "0 0 26 12", width: 26, height: 12, "aria-hidden": "true" }, line, marker(kind, 13, 6, colour));
}

const unpacked = new Map();
function unpack(text) {
  if (!unpacked.has(text)) unpacked.set(text, inflate(text));
  return unpacked.get(text);
}

async function inflate(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser cannot unpack level maps; one from 2023 or later can");
  }
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** A token order with its inverse: places[token] is where a video token stands, tokens[place] the way back. */
async function orderOf(index) {
  const order = data.orders[index];
  if (!order.places32) {
    const places = new Uint32Array(await unpack(order.places));
    order.tokens = new Int32Array(order.seq_len).fill(-1);
    places.forEach((place, token) => { order.tokens[place] = token; });
    order.places32 = places;
  }
  return order;
}
