// Draws the figures of a report from the JSON that stands beside each, and serves its few controls.
"use strict";

const read = (element) => JSON.parse(element.textContent);
const plots = document.querySelectorAll(".plot");
const undrawn = new Set(plots);

const draw = (plot) => {
  if (!undrawn.delete(plot)) return;
  const { data, layout } = read(plot.nextElementSibling);
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, displaylogo: false, responsive: true });
};

// A figure is drawn when it comes near what the reader sees, one per task: the page answers its reader from the start.
const near = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    near.unobserve(target);
    setTimeout(() => draw(target));
  }
}, { rootMargin: "600px" });
plots.forEach((plot) => near.observe(plot));

for (const chooser of document.querySelectorAll("select.chooser")) {
  const figure = chooser.closest("figure");
  const states = read(figure.querySelector(".states"));
  chooser.addEventListener("change", () => {
    const { data, layout, text } = states[chooser.value];
    const plot = figure.querySelector(".plot");
    draw(plot);
    Plotly.update(plot, data, layout);
    figure.querySelector("output").textContent = text;
  });
}

for (const button of document.querySelectorAll("button.copy")) {
  const text = document.getElementById(button.dataset.of);
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text); // not allowed to copy: leave the text ready for the reader's own keys
      button.textContent = "Selected";
    }
  });
}

// A printed page is narrower than most screens, and pictures have the width that they were drawn with.
const fit = (size) => plots.forEach((plot) => Plotly.relayout(plot, size));
const unfolded = []; // what a reader folded away is printed, too
window.addEventListener("beforeprint", () => {
  unfolded.push(...document.querySelectorAll("details:not([open])"));
  unfolded.forEach((details) => { details.open = true; });
  plots.forEach(draw);
  fit({ width: 640 });
});
window.addEventListener("afterprint", () => {
  unfolded.splice(0).forEach((details) => { details.open = false; });
  fit({ width: null, autosize: true });
});
