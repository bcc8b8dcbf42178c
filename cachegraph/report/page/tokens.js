// Which tokens are recomputed: over the sampled image where there is one, else how many.

function tokensView(section) {
  section.append(h("h2", null, "Tokens: which are recomputed when"));
  if (data.tokens) section.append(...frames(data.tokens));
  else section.append(h("p", null, "Which tokens these are is decided while sampling, by their scores; how many is known:"));
  const rows = plan.groups.filter((group) => group.sites.some((site) => plan.rows.some((row) => plan.cells[row[site]].tokens !== undefined)));
  const steps = [...Array(plan.steps).keys()];
  const mean = (group, step) => {
    const counts = group.sites.map((site) => cellOf(step, site)).map((one) => (one.tokens !== undefined ? one.tokens : null));
    const known = counts.filter((one) => one !== null);
    return known.length ? total(known) / known.length : null;
  };
  section.append(h("details", { open: !data.tokens }, h("summary", null, "Tokens recomputed a step, on average over the sites of a row"), h("div", { class: "inside" },
    table("", ["step#", ...rows.map((row) => row.label + "#")], steps.filter((step) => rows.some((row) => mean(row, step) !== null)).map((step) =>
      [String(step), ...rows.map((row) => { const found = mean(row, step); return found === null ? "" : found.toFixed(found % 1 ? 1 : 0); })])))));
}

/** The image with a frame a step that one walks through. */
function frames(found) {
  const [high, wide] = found.grid, side = 320;
  const count = found.shares.length;
  const picture = s("svg", { viewBox: `0 0 ${side} ${side}`, width: side, height: side, role: "img", "aria-label": "tokens over the image" });
  const caption = h("p", { role: "status", id: "frame-words" });
  const slider = h("input", { type: "range", id: "frame", min: 0, max: count - 1, value: 0, step: 1 });
  const rows = found.image.length, pixel = side / rows;
  const image = found.image.flatMap((row, y) => row.map((value, x) => {
    const grey = Math.round(255 * Math.min(Math.max(value, 0), 1));
    return s("rect", { x: x * pixel, y: y * pixel, width: pixel + 0.3, height: pixel + 0.3, fill: `rgb(${grey},${grey},${grey})` });
  }));
  const cells = found.shares[0].map((_, index) => s("rect", {
    x: ((index % wide) * side) / wide, y: (Math.floor(index / wide) * side) / high, width: side / wide, height: side / high, fill: "#ff7800", stroke: "#808080", "stroke-width": 0.5,
  }));
  picture.append(...image, ...cells);
  const draw = () => {
    const step = +slider.value, shares = found.shares[step];
    cells.forEach((cell, index) => cell.setAttribute("fill-opacity", (0.75 * shares[index]).toFixed(3)));
    const chosen = shares.filter((one) => one > 0).length;
    const words = shares.every((one) => one === 1) ? "every token is computed" : chosen ? `${chosen} of ${shares.length} tokens are recomputed at some site, ${(100 * total(shares) / shares.length).toFixed(0)} % on average` : "no token is recomputed";
    caption.textContent = `Step ${step} (${variantOf(step).name}): ${words}.`;
    slider.setAttribute("aria-valuetext", `step ${step}`);
  };
  const move = (by) => () => { slider.value = +slider.value + by; draw(); };
  slider.addEventListener("input", draw);
  draw();
  return [h("p", null, `${found.what} Orange: recomputed, the stronger the more sites do it.`),
    h("div", { class: "frames" }, h("figure", null, picture), h("div", null, caption,
      h("div", { class: "controls" }, h("label", { for: "frame" }, "Step", slider), h("button", { onclick: move(-1) }, "previous"), h("button", { onclick: move(1) }, "next"))))];
}
