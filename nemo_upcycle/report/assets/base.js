"use strict";
// Draws the page's figures as SVG from the data in the page. Texts are set as text, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function set(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const svg = (name, attributes = {}, ...children) =>
  set(document.createElementNS(SVG, name), attributes, children);
const html = (name, attributes = {}, ...children) =>
  set(document.createElement(name), attributes, children);

const digits = (value, count) => String(Number(value.toPrecision(count)));

function short(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("-", "−").replace("e-", "e−");
  if (size < 1000) return digits(value, 4);
  const power = Math.min(4, Math.floor(Math.log10(size) / 3 + 1e-9));
  return `${digits(value / 1000 ** power, 4)} ${["", "k", "M", "B", "T"][power]}`;
}

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i++) found.push(i * step);
  return found;
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

const mix = (share, from, to) =>
  `color-mix(in oklab, var(${to}) ${Math.round(100 * share)}%, var(${from}))`;

// A line under a figure with the values at the pointer, or else a hint.
function readout(hint) {
  const node = html("output", { class: "readout" });
  const say = (text) => {
    node.textContent = text || hint;
    node.classList.toggle("hint", !text);
  };
  say("");
  return { node, say };
}

// Draws at the width that the figure has, again whenever the width changes.
const waiting = [];
function responsive(box, draw) {
  const place = html("div");
  box.append(place);
  let drawn = 0;
  const redraw = () => {
    const width = Math.max(240, Math.floor(place.clientWidth));
    if (width !== drawn) place.replaceChildren(draw((drawn = width)));
  };
  waiting.push(redraw);
  new ResizeObserver(() => requestAnimationFrame(redraw)).observe(place);
}
