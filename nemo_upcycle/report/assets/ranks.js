// Scores, and the parallel mapping.

function dots(chart, box, title) {
  const all = chart.rows.flatMap((row) => row.values.filter(Boolean).flatMap((v) => [v.value - (v.error || 0), v.value + (v.error || 0)]));
  const key = html("div", { class: "legend" });
  for (const each of chart.names) {
    const dot = svg("circle", { cx: 13, cy: 5, r: 4.5, class: `dot ${each.role}` });
    key.append(html("span", {}, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, dot), each.name));
  }
  const draw = (width) => {
    const apart = 20, rowHeight = 22 + apart * chart.names.length, bottom = 44;
    const height = chart.rows.length * rowHeight + bottom;
    let [low, high] = range(all);
    const room = Math.max(0.02, (high - low) * 0.15);
    [low, high] = [Math.max(0, low - room), Math.min(1, high + room)];
    const x = (value) => 12 + ((value - low) / (high - low)) * (width - 70);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title}: ${chart.rows.map((row) => row.label).join("; ")}` });
    for (const tick of ticks(low, high, Math.max(3, width / 110))) {
      root.append(svg("line", { x1: x(tick), x2: x(tick), y1: 0, y2: height - bottom, class: "grid" }));
      root.append(svg("text", { x: x(tick), y: height - bottom + 17, "text-anchor": "middle" }, short(tick)));
    }
    root.append(svg("text", { x: width / 2, y: height - 5, "text-anchor": "middle", class: "label" }, chart.x));
    chart.rows.forEach((row, number) => {
      const top = number * rowHeight;
      root.append(svg("text", { x: 2, y: top + 15, class: "label" }, row.label));
      row.values.forEach((each, model) => {
        if (!each) return;
        const y = top + 14 + apart * (model + 0.7), role = chart.names[model].role;
        if (each.error)
          root.append(svg("line", { x1: x(each.value - each.error), x2: x(each.value + each.error), y1: y, y2: y, class: `curve ${role}` }));
        root.append(svg("circle", { cx: x(each.value), cy: y, r: 5, class: `dot mark ${role}` }));
        root.append(svg("text", { x: x(each.value + (each.error || 0)) + 9, y: y + 4 }, each.value.toFixed(3)));
      });
    });
    return root;
  };
  box.append(key);
  responsive(box, draw);
}

function ranks(chart, box) {
  const values = readout("Point at a rank to read its coordinates.");
  const panels = html("div", { class: "panels" });
  for (const panel of chart.panels) {
    const part = html("div", {}, html("h3", {}, panel.title));
    const draw = (width) => {
      const columns = Math.min(chart.per_node, Math.max(...panel.cells.map((cell) => cell.gpu)) + 1);
      const left = 58, across = Math.min(110, (width - left - 4) / columns);
      const detailed = across >= 54 && chart.nodes.length <= 4, down = detailed ? 24 + 13 * panel.cells[0].place.length : Math.max(26, Math.min(34, across));
      const height = down * chart.nodes.length + 40;
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${panel.title}: ranks on nodes` });
      chart.nodes.forEach((node, row) =>
        root.append(svg("text", { x: left - 8, y: row * down + down / 2 + 4, "text-anchor": "end" }, `node ${node}`)));
      for (const cell of panel.cells) {
        const x = left + cell.gpu * across, y = cell.row * down;
        const node = svg("rect", { x, y, width: across, height: down, class: "cell mark" });
        node.style.fill = `hsl(${(cell.held * 137.5 + 200) % 360} 45% var(--tile-light))`;
        const tell = () => { values.say(`rank ${cell.rank} (${panel.title}): ${cell.place.join(", ")}`); };
        node.addEventListener("pointerenter", tell);
        node.addEventListener("pointerdown", tell);
        root.append(node);
        const texts = detailed ? [`rank ${cell.rank}`, ...cell.place] : [`${cell.rank}`];
        texts.forEach((text, line) => {
          const at = detailed ? y + 17 + 13 * line : y + down / 2 + 4;
          root.append(svg("text", { x: x + across / 2, y: at, class: "value" }, text));
        });
      }
      const inFrame = (cell, next) => next && next.row === cell.row && next.group === cell.group;
      for (let i = 0; i < panel.cells.length; i++) {
        if (panel.cells[i].group === null) break;
        const first = panel.cells[i];
        while (inFrame(first, panel.cells[i + 1])) i++;
        const size = panel.cells[i].gpu - first.gpu + 1;
        root.append(svg("rect", { x: left + first.gpu * across + 2, y: first.row * down + 2, width: size * across - 4, height: down - 4, rx: 3, class: "frame" }));
      }
      for (let gpu = 0; gpu < columns; gpu++)
        root.append(svg("text", { x: left + (gpu + 0.5) * across, y: height - 24, "text-anchor": "middle" }, `${gpu}`));
      root.append(svg("text", { x: left + (columns * across) / 2, y: height - 5, "text-anchor": "middle", class: "label" }, "GPU of the node"));
      return root;
    };
    panels.append(part);
    responsive(part, draw);
  }
  box.append(panels, values.node);
}
