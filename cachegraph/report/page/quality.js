// Quality against time, where a comparison or a search left figures.

function qualityView(section) {
  const found = data.quality, points = found.points;
  const most = Math.max(...points.map((one) => one.x)) * 1.05;
  const values = points.map((one) => one.y).filter((one) => one !== null);
  const low = Math.min(...values), high = Math.max(...values), pad = (high - low || 1) * 0.12;
  const height = 380, x = (value) => LEFT + ((WIDTH - LEFT - RIGHT - 120) * value) / most;
  const y = (value) => 20 + (height - 60) * (1 - (value - low + pad) / (high - low + 2 * pad));
  const title = `${found.y} against ${found.x}`;
  const marks = [0, 0.25, 0.5, 0.75, 1].flatMap((part) => {
    const value = low + part * (high - low), across = part * most;
    return [s("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }), s("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)),
      s("text", { class: "scale", x: x(across), y: height - 18, "text-anchor": "middle" }, across.toPrecision(3))];
  });
  const best = points.filter((one) => one.front).sort((a, b) => a.x - b.x);
  const line = s("polyline", { points: best.map((one) => `${x(one.x)},${y(one.y)}`).join(" "), fill: "none", stroke: "var(--bar)", "stroke-width": 2 });
  const dots = points.filter((one) => one.y !== null).map((one) => [
    s("circle", { cx: x(one.x), cy: y(one.y), r: one.front ? 6 : 4, fill: one.front ? "var(--bar)" : "var(--bar2)" }, s("title", null, `${one.name}: ${one.x} ${found.x}, ${one.y} ${found.y}`)),
    s("text", { x: x(one.x) + 9, y: y(one.y) + 4 }, one.name)]);
  section.append(h("h2", null, "Quality against time"), h("p", null, found.what),
    h("figure", null, wide(title, s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title }, s("title", null, title), marks, line, dots, s("text", { x: WIDTH - RIGHT, y: height - 2, "text-anchor": "end" }, found.x), s("text", { x: 2, y: 12 }, found.y))),
      h("figcaption", null, "Large dots: nothing else is both quicker and closer.")),
    table("", ["schedule", found.x + "#", found.y + "#", ""], points.map((one) => [one.name, one.x.toPrecision(4), one.y === null ? "exact" : one.y.toFixed(2), one.front ? "on the front" : ""])));
}
