// SPDX-License-Identifier: Apache-2.0
// The step's timeline: compute, wait, link and two host lanes, predicted above measured.
"use strict";

// Time in which at least one of the items runs: transfers may overlap.
function covered(items) {
  let sum = 0, until = 0;
  for (const item of [...items].sort((a, b) => a.start_ns - b.start_ns)) {
    sum += Math.max(0, item.end_ns - Math.max(item.start_ns, until));
    until = Math.max(until, item.end_ns);
  }
  return sum;
}

class Timeline {
  constructor(box, sides) {
    this.box = box;
    this.sides = ["predicted", "measured"].filter((side) => sides[side].length)
      .map((name) => ({ name, items: sides[name], end: Math.max(...sides[name].map((i) => i.end_ns)) }));
    const ends = this.sides.map((side) => side.end);
    this.same = ends.length < 2 || Math.max(...ends) / Math.min(...ends) < 3;
    this.view = [0, 1];
    this.left = 128;
    this.laneHeight = 26;
    this.marked = null;
    for (const side of this.sides) this.order(side);
    this.draw();
  }

  // Lanes in a fixed order; a lane nobody uses is left out.
  order(side) {
    side.lanes = ["compute", "wait", "link", "to_host", "to_device"].filter((r) => side.items.some((i) => i.resource === r));
    side.sections = [];
    for (const item of [...side.items].sort((a, b) => a.start_ns - b.start_ns)) {
      const open = side.sections.find((s) => s.name === item.section);
      if (open) open.end = Math.max(open.end, item.end_ns);
      else side.sections.push({ name: item.section, start: item.start_ns, end: item.end_ns });
    }
  }

  span(side) { return this.same ? Math.max(...this.sides.map((s) => s.end)) : side.end; }

  x(side, ns) {
    const [low, high] = this.view;
    return this.left + ((ns / this.span(side) - low) / (high - low)) * (this.width - this.left - 12);
  }

  draw() {
    this.box.textContent = "";
    this.width = Math.max(480, this.box.clientWidth);
    const head = 24, foot = 26;
    const height = this.sides.reduce((sum, s) => sum + head + s.lanes.length * this.laneHeight + foot, 4);
    this.svg = el("svg", { viewBox: `0 0 ${this.width} ${height}`, height, role: "img",
      "aria-label": "timeline of one step" }, this.box);
    const clip = el("clipPath", { id: "plot" }, el("defs", {}, this.svg));
    el("rect", { x: this.left, y: 0, width: this.width - this.left - 12, height }, clip);
    let top = 4;
    for (const side of this.sides) {
      const lanes = side.lanes.length * this.laneHeight;
      this.drawSide(side, top, head, lanes);
      top += head + lanes + foot;
    }
    this.height = height;
    this.listen();
  }

  drawSide(side, top, head, lanes) {
    const plot = el("g", { "clip-path": "url(#plot)" }, this.svg);
    el("text", { class: "strong", x: 0, y: top + 16 }, this.svg, side.name[0].toUpperCase() + side.name.slice(1));
    side.sections.forEach((section, i) => {
      const from = this.x(side, section.start), to = this.x(side, section.end);
      if (i % 2 === 0) {
        el("rect", { class: "band", x: from, y: top, width: Math.max(0, to - from), height: head + lanes }, plot);
      }
      const start = Math.max(from, this.left);
      if (Math.min(to, this.width) - start > 7 * section.name.length + 8) {
        el("text", { x: start + 5, y: top + 16 }, plot, section.name);
      }
    });
    side.lanes.forEach((lane, row) => {
      const y = top + head + row * this.laneHeight;
      el("text", { x: 0, y: y + 16 }, this.svg, lane);
      const busy = covered(side.items.filter((i) => i.resource === lane));
      el("text", { x: this.left - 10, y: y + 16, "text-anchor": "end" }, this.svg, nanos(busy));
    });
    for (const item of side.items) this.drawItem(side, item, plot, top + head);
    const y = top + head + lanes;
    el("line", { class: "axis", x1: this.left, x2: this.width - 12, y1: y + 2, y2: y + 2 }, this.svg);
    const span = this.span(side);
    for (const at of ticks(this.view[0] * span, this.view[1] * span, 9)) {
      const px = this.x(side, at);
      if (px < this.left - 1 || px > this.width - 10) continue;
      el("text", { x: px, y: y + 17, "text-anchor": px > this.width - 40 ? "end" : "middle" }, this.svg, nanos(at));
    }
  }

  drawItem(side, item, plot, top) {
    const from = this.x(side, item.start_ns), to = this.x(side, item.end_ns);
    if (to < this.left || from > this.width) return;
    const width = Math.max(to - from - 0.5, 0.8);
    const y = top + side.lanes.indexOf(item.resource) * this.laneHeight + 3;
    const rect = el("rect", { class: "item " + item.resource, x: from, y, width, rx: Math.min(2, width / 3),
      height: this.laneHeight - 6 }, plot);
    rect.dataset.key = item.section + "#" + item.index;
    rect.item = item;
    rect.side = side;
    if (width > 6.2 * item.label.length + 6) {
      el("text", { class: "inside", x: Math.max(from, this.left) + 4, y: y + 14 }, plot, item.label);
    }
  }

  mark(key) {
    if (key === this.marked) return;
    this.marked = key;
    for (const rect of this.svg.querySelectorAll(".item")) rect.classList.toggle("on", rect.dataset.key === key);
  }

  describe(rect) {
    const { item, side } = rect;
    const other = this.sides.find((s) => s !== side);
    const twin = other && other.items.find((i) => i.section === item.section && i.index === item.index);
    const own = nanos(item.end_ns - item.start_ns);
    return `${item.label}\n${item.section}, ${item.resource}\n${side.name} ${own} from ${nanos(item.start_ns)}`
      + (twin ? `\n${other.name} ${nanos(twin.end_ns - twin.start_ns)} from ${nanos(twin.start_ns)}` : "");
  }

  zoom(factor, center = 0.5) {
    const [low, high] = this.view, at = low + (high - low) * center;
    const size = Math.min(1, Math.max(1e-5, (high - low) * factor));
    const start = Math.min(Math.max(0, at - size * center), 1 - size);
    this.view = [start, start + size];
    this.draw();
  }

  listen() {
    const plotWidth = this.width - this.left - 12;
    const at = (event) => {
      const px = (event.clientX - this.svg.getBoundingClientRect().left) * (this.width / this.svg.clientWidth);
      return Math.min(1, Math.max(0, (px - this.left) / plotWidth));
    };
    let from = null, shade = null;
    this.svg.addEventListener("mousedown", (event) => { from = at(event); event.preventDefault(); });
    this.svg.addEventListener("mousemove", (event) => {
      if (from !== null) {
        const to = at(event);
        shade = shade || el("rect", { class: "drag", y: 0, height: this.height }, this.svg);
        shade.setAttribute("x", this.left + Math.min(from, to) * plotWidth);
        shade.setAttribute("width", Math.abs(to - from) * plotWidth);
        hideTip();
        return;
      }
      const rect = event.target.closest(".item");
      this.mark(rect ? rect.dataset.key : null);
      if (rect) showTip(event, this.describe(rect)); else hideTip();
    });
    const finish = (event) => {
      if (from === null) return;
      const to = at(event), [low, high] = this.view;
      const start = Math.min(from, to), end = Math.max(from, to);
      from = null;
      if (shade) shade.remove();
      shade = null;
      if (end - start > 0.004) {
        this.view = [low + (high - low) * start, low + (high - low) * end];
        this.draw();
      }
    };
    this.svg.addEventListener("mouseup", finish);
    this.svg.addEventListener("mouseleave", (event) => { finish(event); hideTip(); });
    this.svg.addEventListener("dblclick", () => { this.view = [0, 1]; this.draw(); });
    this.svg.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event));
    }, { passive: false });
  }
}
