// SPDX-License-Identifier: Apache-2.0
// Small helpers for the charts, and the loss and memory charts.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function el(name, attributes, parent, text) {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function nanos(ns) {
  if (ns === 0) return "0";
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["µs", 1e3]]) {
    if (Math.abs(ns) >= size) return +(ns / size).toPrecision(3) + " " + unit;
  }
  return Math.round(ns) + " ns";
}

function bytes(count) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (count >= size) return +(count / size).toPrecision(4) + " " + unit;
  }
  return Math.round(count) + " B";
}

// Round steps (1, 2, 5 times a power of `base`) that cut [low, high] in about `count` parts.
function ticks(low, high, count, base) {
  const rough = (high - low) / count || 1;
  let step;
  if (base === 2) {
    step = 2 ** Math.ceil(Math.log2(rough));
  } else {
    const power = 10 ** Math.floor(Math.log10(rough));
    step = power * ([1, 2, 5, 10].find((m) => m * power >= rough) || 10);
  }
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return found;
}

const tip = document.getElementById("tip");

function showTip(event, text) {
  tip.hidden = false;
  tip.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const top = event.clientY + 18 + tip.offsetHeight > innerHeight
    ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = top + "px";
}

function hideTip() { tip.hidden = true; }

function frame(box, width, height, left, bottom, xs, ys, xText, yText, x, y) {
  const svg = el("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" }, box);
  for (const at of ys) {
    el("line", { class: "grid", x1: left, x2: width - 12, y1: y(at), y2: y(at) }, svg);
    el("text", { x: left - 8, y: y(at) + 4, "text-anchor": "end" }, svg, yText(at));
  }
  for (const at of xs) {
    el("text", { x: x(at), y: height - bottom + 18, "text-anchor": "middle" }, svg, xText(at));
  }
  el("line", { class: "axis", x1: left, x2: width - 12, y1: height - bottom, y2: height - bottom }, svg);
  return svg;
}

function path(points) {
  return points.map((p, i) => (i ? "L" : "M") + p[0].toFixed(1) + " " + p[1].toFixed(1)).join("");
}

function smooth(values, weight) {
  let mean = values[0];
  return values.map((v) => (mean = weight * mean + (1 - weight) * v));
}

function lossChart(box, loss, validation) {
  box.textContent = "";
  const width = Math.max(320, box.clientWidth), height = 260, left = 48, bottom = 28;
  const all = loss.concat(validation).map((row) => row.loss);
  const low = Math.min(...all), high = Math.max(...all), room = (high - low || 1) * 0.06;
  const steps = loss.concat(validation).map((row) => row.step);
  const first = Math.min(...steps), last = Math.max(...steps);
  const x = (s) => left + ((s - first) / (last - first || 1)) * (width - left - 24);
  const y = (v) => 10 + ((high + room - v) / (high - low + 2 * room)) * (height - bottom - 10);
  const svg = frame(box, width, height, left, bottom, ticks(first, last, 8).filter(Number.isInteger),
    ticks(low - room, high + room, 7), String, (v) => +v.toFixed(3), x, y);
  svg.setAttribute("aria-label", "loss over steps");
  el("path", { class: "raw", d: path(loss.map((row) => [x(row.step), y(row.loss)])) }, svg);
  const means = smooth(loss.map((row) => row.loss), loss.length < 40 ? 0 : 0.6);
  el("path", { class: "train", d: path(loss.map((row, i) => [x(row.step), y(means[i])])) }, svg);
  if (validation.length > 1) {
    el("path", { class: "val", d: path(validation.map((row) => [x(row.step), y(row.loss)])) }, svg);
  }
  for (const row of validation) el("circle", { class: "valdot", cx: x(row.step), cy: y(row.loss), r: 4 }, svg);
  const cursor = el("line", { class: "cursor", y1: 10, y2: height - bottom, visibility: "hidden" }, svg);
  svg.addEventListener("mousemove", (event) => {
    const at = (event.offsetX * width) / box.clientWidth;
    const near = loss.reduce((a, b) => (Math.abs(x(b.step) - at) < Math.abs(x(a.step) - at) ? b : a));
    cursor.setAttribute("x1", x(near.step));
    cursor.setAttribute("x2", x(near.step));
    cursor.setAttribute("visibility", "visible");
    const held = validation.find((row) => row.step === near.step);
    showTip(event, `step ${near.step}\nloss ${near.loss.toFixed(4)}`
      + (held ? `\nvalidation ${held.loss.toFixed(4)}` : "")
      + (near.tokens_per_s ? `\n${Math.round(near.tokens_per_s).toLocaleString()} tokens/s` : ""));
  });
  svg.addEventListener("mouseleave", () => { hideTip(); cursor.setAttribute("visibility", "hidden"); });
}

// A step function: memory holds its value until the next event.
function stairs(points, x, y, end) {
  const out = [];
  points.forEach(([at, value], i) => {
    if (i) out.push([x(at), y(points[i - 1][1])]);
    out.push([x(at), y(value)]);
  });
  out.push([x(end), y(points[points.length - 1][1])]);
  return out;
}

function memoryChart(box, memory) {
  box.textContent = "";
  const width = Math.max(320, box.clientWidth), height = 240, left = 76, bottom = 28;
  const series = ["predicted", "measured"].filter((side) => memory[side].length);
  const spans = {};
  for (const side of series) spans[side] = memory[side][memory[side].length - 1][0] || 1;
  const end = Math.max(...Object.values(spans));
  const high = Math.max(...series.flatMap((side) => memory[side].map((p) => p[1]))) * 1.28 || 1;
  const x = (t) => left + (t / end) * (width - left - 24);
  const y = (v) => 10 + (1 - v / high) * (height - bottom - 10);
  const svg = frame(box, width, height, left, bottom, ticks(0, end, 8), ticks(0, high, 4, 2), nanos, bytes, x, y);
  svg.setAttribute("aria-label", "memory over the step");
  series.forEach((side, row) => {
    const line = stairs(memory[side], x, y, spans[side]);
    if (side === "predicted") {
      const area = path(line) + `L${x(spans[side]).toFixed(1)} ${y(0)}L${x(0)} ${y(0)}Z`;
      el("path", { class: "area", d: area }, svg);
    }
    el("path", { class: side === "predicted" ? "train" : "val", d: path(line) }, svg);
    const peak = memory[side].reduce((a, b) => (b[1] > a[1] ? b : a));
    el("circle", { class: "peak", cx: x(peak[0]), cy: y(peak[1]), r: 4 }, svg);
    // One line of text a series, at fixed heights, so that near peaks stay readable.
    const textY = 20 + 16 * row, right = x(peak[0]) > width - 260;
    el("line", { class: "axis", x1: x(peak[0]), x2: x(peak[0]), y1: textY - 10, y2: y(peak[1]) - 4 }, svg);
    el("text", { class: "strong", x: x(peak[0]) + (right ? -6 : 6), y: textY,
      "text-anchor": right ? "end" : "start" }, svg, `${side} peak ${bytes(peak[1])} at ${nanos(peak[0])}`);
  });
  const cursor = el("line", { class: "cursor", y1: 10, y2: height - bottom, visibility: "hidden" }, svg);
  svg.addEventListener("mousemove", (event) => {
    const px = (event.offsetX * width) / box.clientWidth;
    const at = Math.min(end, Math.max(0, ((px - left) / (width - left - 24)) * end));
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    cursor.setAttribute("visibility", "visible");
    const lines = series.filter((side) => at <= spans[side]).map((side) => {
      const held = memory[side].filter((p) => p[0] <= at).pop() || memory[side][0];
      return `${side} ${bytes(held[1])}`;
    });
    showTip(event, [nanos(at), ...lines].join("\n"));
  });
  svg.addEventListener("mouseleave", () => { hideTip(); cursor.setAttribute("visibility", "hidden"); });
}
