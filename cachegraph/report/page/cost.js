// What steps cost and what is kept between them, as charts; each with its numbers in a table.

const WIDTH = 1000, LEFT = 70, RIGHT = 10;

const stepX = (step) => LEFT + ((WIDTH - LEFT - RIGHT) * step) / plan.steps;

/** A frame with a scale: values from 0 to most. */
function frame(height, most, unit, title) {
  const y = (value) => 10 + (height - 30) * (1 - value / (most || 1));
  const marks = [0, 0.5, 1].map((part) => [
    s("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(part * most), y2: y(part * most) }),
    s("text", { x: LEFT - 6, y: y(part * most) + 4, "text-anchor": "end" }, unit(part * most))]);
  const every = Math.ceil(plan.steps / 25);
  const numbers = [...Array(plan.steps).keys()].filter((step) => step % every === 0).map((step) =>
    s("text", { class: "scale", x: (stepX(step) + stepX(step + 1)) / 2, y: height - 4, "text-anchor": "middle" }, String(step)));
  const picture = s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title }, s("title", null, title), marks, numbers);
  return [picture, y];
}

function bars(values, most, unit, title, colour, words) {
  const [picture, y] = frame(190, most, unit, title);
  values.forEach((value, step) => picture.append(s("rect", {
    x: stepX(step) + 0.5, width: Math.max(stepX(1) - stepX(0) - 1, 0.5), y: y(value), height: Math.max(y(0) - y(value), 0), fill: colour,
  }, s("title", null, words(step)))));
  return picture;
}

function outline(values, y, colour, dashed) {
  const points = values.flatMap((value, step) => [`${stepX(step)},${y(value)}`, `${stepX(step + 1)},${y(value)}`]);
  return s("polyline", { points: points.join(" "), fill: "none", stroke: colour, "stroke-width": 2, "stroke-dasharray": dashed ? "5 4" : null });
}

/** One bar a kept tensor, from the step that makes it to the last that uses it; a line a row of the plan. */
function lifelines() {
  const rows = plan.groups.flatMap((group) => {
    const inside = new Set(group.sites);
    const lives = plan.kept.filter((one) => one.sites.some((site) => inside.has(site))).sort((a, b) => a.made - b.made);
    return [...grouped(lives, (one) => one.what)].map(([what, found]) => ({ label: what === "value" ? group.label : `${group.label}, ${what}`, found }));
  });
  const lanes = rows.flatMap((row) => {
    const ends = [];
    return row.found.map((one) => {
      let lane = ends.findIndex((end) => end <= one.made);
      if (lane < 0) lane = ends.length;
      ends[lane] = one.last;
      return { row, one, lane };
    });
  });
  let top = 10;
  for (const row of rows) {
    row.top = top;
    row.lanes = 1 + Math.max(...lanes.filter((one) => one.row === row).map((one) => one.lane));
    top += 16 + 7 * row.lanes;
  }
  const height = top + 20, title = "How long values are kept";
  const picture = s("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": title }, s("title", null, title));
  for (const row of rows) picture.append(s("text", { x: LEFT, y: row.top + 9 }, row.label));
  for (const { row, one, lane } of lanes) {
    picture.append(s("rect", { x: (stepX(one.made) + stepX(one.made + 1)) / 2, width: Math.max(stepX(one.last) - stepX(one.made), 2), y: row.top + 13 + 7 * lane, height: 5, rx: 2, fill: one.what === "value" ? "var(--bar)" : "var(--bar2)" },
      s("title", null, `made at step ${one.made}, last used at step ${one.last}, ${size(one.bytes)}`)));
  }
  const every = Math.ceil(plan.steps / 25);
  for (let step = 0; step < plan.steps; step += every) picture.append(s("text", { class: "scale", x: (stepX(step) + stepX(step + 1)) / 2, y: height - 4, "text-anchor": "middle" }, String(step)));
  return picture;
}

function costView(section) {
  const cost = data.cost, memory = Math.max(...cost.cache_bytes, ...cost.unfreed_cache_bytes);
  const chart = (picture, words) => h("figure", null, wide(words, picture), h("figcaption", null, words));
  const flops = bars(cost.flops, Math.max(cost.full_flops, ...cost.flops), amount, "FLOPs of each step", "var(--bar)",
    (step) => `step ${step}, ${variantOf(step).name}: ${amount(cost.flops[step])} FLOPs, ${percent(cost.flops[step], cost.full_flops)} of a full step`);
  section.append(h("h2", null, "Cost: what steps take and what is kept between them"),
    h("p", null, `${amount(cost.total_flops)} FLOPs in place of ${amount(cost.uncached_flops)}: at most ${cost.speed_up_limit.toFixed(2)} times as fast, if time were FLOPs. ${data.batch}.`),
    h("h3", null, "FLOPs of each step"), chart(flops, "The first step of a variant includes what is computed once for all of them."));
  if (data.measured) section.append(...measured(data.measured));
  if (memory > 0) {
    const [picture, y] = frame(190, memory, size, "Bytes kept after each step");
    picture.append(outline(cost.unfreed_cache_bytes, y, "var(--bar2)", true), outline(cost.cache_bytes, y, "var(--bar)", false));
    section.append(h("h3", null, "Cache memory after each step"),
      chart(picture, `Solid: what is kept, at most ${size(Math.max(...cost.cache_bytes))}. Dashed: what would be kept if nothing were freed after its last use.`),
      h("h3", null, "What lives when"), chart(lifelines(), "A bar for what one step makes, from that step to the last that uses it."));
  }
  const rows = [...Array(plan.steps).keys()].map((step) => [String(step), variantOf(step).name, amount(cost.flops[step]), percent(cost.flops[step], cost.full_flops),
    size(cost.cache_bytes[step]), size(cost.known_bytes[step]), cost.peak_bytes.length ? size(cost.peak_bytes[step]) : ""]);
  section.append(h("details", null, h("summary", null, "These numbers as a table"), h("div", { class: "inside" },
    table(`Weights take ${size(cost.weight_bytes)}`, ["step#", "variant", "FLOPs#", "of full#", "kept after it#", "known when it begins#", "peak, about#"], rows))));
}

/** Predicted against measured: share of a full step that each variant takes. */
function measured(found) {
  const rows = found.variants.map((one) => [one.name, seconds(one.seconds), percent(one.seconds, found.full_seconds), percent(one.flops, data.cost.full_flops)]);
  return [h("h3", null, "Predicted and measured"),
    h("p", null, `${found.what}: ${found.speed_up.toFixed(2)} times as fast as uncached, of at most ${data.cost.speed_up_limit.toFixed(2)} by FLOPs.`),
    table("A call of each variant", ["variant", "measured#", "of a full step#", "by FLOPs#"], rows)];
}
