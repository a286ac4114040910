// The load of experts.

const LARGEST = 4; // the colors end at 4 times an even share, and at a quarter of one

// From -1, a quarter of an even share and less, to 1, four times an even share and more.
function excess(percent) {
  const share = Math.log2(Math.max(percent / 100, 1e-6)) / Math.log2(LARGEST);
  return Math.min(1, Math.max(-1, share));
}

function heat(chart, box, title) {
  let index = chart.at.length - 1, playing = 0, cells = [];
  const values = readout("Point at a cell to read its load.");
  let pointed = null;
  const said = html("output", {});
  const slider = html("input", { type: "range", min: 0, max: index, step: 1, value: index, "aria-label": "step of the run" });
  const button = html("button", { type: "button" }, "Play");
  const fill = () => {
    const { step, tokens } = chart.at[index];
    said.textContent = `step ${step}` + (tokens === null ? "" : ` · ${short(tokens)} tokens`);
    slider.setAttribute("aria-valuetext", said.textContent);
    for (const { node, text, row, expert } of cells) {
      const percent = chart.values[index][row][expert];
      const share = excess(percent);
      node.style.fill = mix(Math.abs(share), "--even", share < 0 ? "--cold" : "--hot");
      node.dataset.load = percent;
      if (!text) continue;
      text.textContent = (percent / 100).toFixed(2);
      text.classList.toggle("inverse", Math.abs(share) > 0.6);
    }
    if (pointed) {
      const load = (chart.values[index][pointed.row][pointed.expert] / 100).toFixed(2);
      values.say(`layer ${pointed.layer}, expert ${pointed.expert}: ${load} × an even share`);
    }
  };
  const go = (to) => {
    index = Math.min(chart.at.length - 1, Math.max(0, to));
    slider.value = index;
    fill();
  };
  const stop = () => {
    clearInterval(playing);
    playing = 0;
    button.textContent = "Play";
  };
  slider.addEventListener("input", () => { stop(); go(Number(slider.value)); });
  button.addEventListener("click", () => {
    if (playing) return stop();
    if (index === chart.at.length - 1) go(0);
    button.textContent = "Stop";
    playing = setInterval(() => {
      go(index + 1);
      if (index === chart.at.length - 1) stop();
    }, Math.max(60, Math.min(500, 6000 / chart.at.length)));
  });
  const draw = (width) => {
    const left = 34 + 7 * String(chart.layers[chart.layers.length - 1]).length, top = 4, bottom = 40;
    const across = (width - left - 4) / chart.experts;
    const down = Math.max(9, Math.min(across, chart.layers.length > 16 ? 16 : 30));
    const height = top + bottom + down * chart.layers.length;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title}: layers by experts` });
    const every = (count, size, least) => { const n = Math.ceil(least / size); return (i) => i % n === 0 || count <= n; };
    const rowHas = every(chart.layers.length, down, 14), columnHas = every(chart.experts, across, 24);
    cells = [];
    chart.layers.forEach((layer, row) => {
      const y = top + row * down;
      if (rowHas(row)) root.append(svg("text", { x: left - 6, y: y + down / 2 + 4, "text-anchor": "end" }, `${layer}`));
      for (let expert = 0; expert < chart.experts; expert++) {
        const x = left + expert * across;
        const node = svg("rect", { x, y, width: across, height: down, class: "cell mark" });
        const text = across >= 27 && down >= 18 ? svg("text", { x: x + across / 2, y: y + down / 2 + 4, class: "value" }) : null;
        const tell = () => {
          pointed = { layer, row, expert };
          fill();
        };
        node.addEventListener("pointerenter", tell);
        node.addEventListener("pointerdown", tell);
        root.append(node);
        if (text) root.append(text);
        cells.push({ node, text, row, expert });
      }
    });
    for (let expert = 0; expert < chart.experts; expert++)
      if (columnHas(expert))
        root.append(svg("text", { x: left + (expert + 0.5) * across, y: height - bottom + 16, "text-anchor": "middle" }, `${expert}`));
    const middle = top + (down * chart.layers.length) / 2;
    root.append(svg("text", { x: left + (width - left) / 2, y: height - 5, "text-anchor": "middle", class: "label" }, chart.x));
    root.append(svg("text", { x: 12, y: middle, transform: `rotate(-90 12 ${middle})`, "text-anchor": "middle", class: "label" }, chart.y));
    fill();
    return root;
  };
  const scale = html("div", { class: "legend" }, html("span", {}, "load relative to even: ¼", html("i", { class: "heatramp" }), "4 and more"));
  const wanted = /[#&]step=(\d+)/.exec(location.hash); // REPORT#step=30 opens at a step
  if (wanted) {
    const distance = (each) => Math.abs(each.step - Number(wanted[1]));
    index = chart.at.reduce((best, each, i) => (distance(each) < distance(chart.at[best]) ? i : best), 0);
    slider.value = index;
  }
  box.append(html("div", { class: "controls" }, button, slider, said), scale);
  responsive(box, draw);
  box.append(values.node);
}
