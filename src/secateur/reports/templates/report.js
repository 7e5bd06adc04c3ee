// Draws the figures of a report from the JSON that stands beside each, and serves its few controls.
"use strict";

const read = (element) => JSON.parse(element.textContent);
const plots = document.querySelectorAll(".plot");

for (const plot of plots) {
  const { data, layout } = read(plot.nextElementSibling);
  Plotly.newPlot(plot, data, layout, { displayModeBar: false, displaylogo: false, responsive: true });
}

for (const chooser of document.querySelectorAll("select.chooser")) {
  const figure = chooser.closest("figure");
  const states = read(figure.querySelector(".states"));
  chooser.addEventListener("change", () => {
    const { x, title, text } = states[chooser.value];
    Plotly.update(figure.querySelector(".plot"), { x }, { "xaxis.title.text": title });
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
const draw = (width) => plots.forEach((plot) => Plotly.relayout(plot, width ? { width } : { width: null, autosize: true }));
window.addEventListener("beforeprint", () => draw(640));
window.addEventListener("afterprint", () => draw(null));
