// Draws every figure.

const kinds = { lines, heat, dots, ranks };
for (const box of document.querySelectorAll("[data-figure]")) {
  const chart = data[box.dataset.figure];
  const title = box.parentElement.querySelector("h2").textContent;
  try {
    kinds[chart.kind](chart, box, title);
    waiting.splice(0).forEach((redraw) => redraw());
    box.dataset.drawn = "yes";
  } catch (error) {
    console.error(error);
    box.replaceChildren(html("p", { class: "missing" }, `This figure could not be drawn: ${error.message}`));
  }
}
