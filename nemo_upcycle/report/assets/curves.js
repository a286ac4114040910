// Curves over the run.

function legend(chart) {
  const box = html("div", { class: "legend" });
  for (const each of chart.series.filter((one) => one.name)) {
    const sample = svg("path", { d: "M1 5H25", class: `curve ${each.role} ${each.style}` });
    box.append(html("span", {}, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, sample), each.name));
  }
  if (chart.layers && chart.layers.length > 1) {
    const last = chart.layers[chart.layers.length - 1].layer;
    box.append(html("span", {}, `layer ${chart.layers[0].layer}`, html("i", { class: "ramp" }), `${last}`));
  }
  if (chart.reference) {
    const sample = svg("path", { d: "M1 5H25", class: "reference" });
    box.append(html("span", {}, svg("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, sample), chart.reference.name));
  }
  return box;
}

function yRange(chart, curves) {
  const values = curves.flatMap((curve) => curve.points.map((point) => point[1]));
  if (chart.reference) values.push(chart.reference.y);
  let [low, high] = range(values);
  // From 0 where 0 is near: a distance or a rate is then seen as what it is.
  if (low > 0 && low < 0.4 * high) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low === 0 ? 0 : low - room, high + room];
}

function lines(chart, box, title) {
  const values = readout("Point at the curves to read values.");
  const curves = [...(chart.layers || []), ...chart.series];
  const draw = (width) => {
    const height = Math.round(Math.min(340, Math.max(230, width * 0.5)));
    const [x0, x1] = [0, range(curves.flatMap((curve) => curve.points.map((point) => point[0])))[1] || 1];
    const [y0, y1] = yRange(chart, curves);
    const yTicks = ticks(y0, y1, height / 55), xTicks = ticks(x0, x1, Math.max(3, width / 120));
    const left = 30 + 7 * Math.max(...yTicks.map((tick) => short(tick).length));
    const right = 14, top = 8, bottom = 44;
    const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
    const y = (value) => top + ((y1 - value) / (y1 - y0)) * (height - top - bottom);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title}: ${chart.y} over ${chart.x}` });
    for (const tick of yTicks) {
      root.append(svg("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "grid" }));
      root.append(svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
    }
    root.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
    for (const tick of xTicks)
      root.append(svg("text", { x: x(tick), y: height - bottom + 17, "text-anchor": "middle" }, short(tick)));
    const middle = (top + height - bottom) / 2;
    root.append(svg("text", { x: (left + width - right) / 2, y: height - 5, "text-anchor": "middle", class: "label" }, chart.x));
    root.append(svg("text", { x: 12, y: middle, transform: `rotate(-90 12 ${middle})`, "text-anchor": "middle", class: "label" }, chart.y));
    if (chart.reference)
      root.append(svg("line", { x1: left, x2: width - right, y1: y(chart.reference.y), y2: y(chart.reference.y), class: "reference" }));
    const path = (points) => "M" + points.map((p) => `${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("L");
    (chart.layers || []).forEach((each, index) => {
      const curve = svg("path", { d: path(each.points), class: "curve layer mark" });
      curve.style.stroke = mix(index / Math.max(1, chart.layers.length - 1), "--first", "--last");
      root.append(curve);
    });
    const order = { faint: 0, line: 1, dashed: 2 };
    for (const each of [...chart.series].sort((a, b) => order[a.style] - order[b.style])) {
      root.append(svg("path", { d: path(each.points), class: `curve mark ${each.role} ${each.style}` }));
      if (each.style === "dashed" || each.points.length === 1)
        for (const p of each.points)
          root.append(svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3.5, class: `dot mark ${each.role}` }));
    }
    const cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
    root.append(cursor);
    const show = (event) => {
      const place = event.clientX - root.getBoundingClientRect().left;
      const at = x0 + ((place - left) / (width - left - right)) * (x1 - x0);
      const near = (points) => points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const named = chart.series.filter((each) => each.name && each.points.length);
      const first = near(named[0].points)[0];
      set(cursor, { x1: x(first), x2: x(first), visibility: "visible" }, []);
      const said = named.map((each) => `${each.name} ${digits(near(each.points)[1], 5)}`);
      values.say(`at ${short(first)} ${chart.x.replace("training ", "")}: ${said.join(" · ")}`);
    };
    root.addEventListener("pointermove", show);
    root.addEventListener("pointerdown", show);
    root.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "mouse") return; // a finger that leaves the screen
      cursor.setAttribute("visibility", "hidden");
      values.say("");
    });
    return root;
  };
  box.append(legend(chart));
  responsive(box, draw);
  box.append(values.node);
}
