// SPDX-License-Identifier: Apache-2.0
// Puts the charts into the page and keeps them at its width.
"use strict";

(function () {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const root = document.documentElement;
  const part = (id) => document.getElementById(id);

  part("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
  });
  const asked = new URLSearchParams(location.search).get("theme");
  if (asked === "dark" || asked === "light") root.dataset.theme = asked;

  let timeline = null;
  function draw() {
    if (part("loss")) lossChart(part("loss"), data.loss, data.validation);
    if (part("memory")) memoryChart(part("memory"), data.memory);
    if (timeline) timeline.draw();
  }
  if (part("timeline")) {
    timeline = new Timeline(part("timeline"), data.timeline);
    const scale = document.querySelector('[data-zoom="scale"]');
    scale.hidden = timeline.sides.length < 2;
    scale.setAttribute("aria-pressed", timeline.same);
    for (const button of document.querySelectorAll("[data-zoom]")) {
      button.addEventListener("click", () => {
        const what = button.dataset.zoom;
        if (what === "in") timeline.zoom(0.5);
        else if (what === "out") timeline.zoom(2);
        else if (what === "reset") { timeline.view = [0, 1]; timeline.draw(); }
        else { timeline.same = !timeline.same; button.setAttribute("aria-pressed", timeline.same); timeline.draw(); }
      });
    }
  }
  draw();
  let pending = 0;
  addEventListener("resize", () => { cancelAnimationFrame(pending); pending = requestAnimationFrame(draw); });
})();
