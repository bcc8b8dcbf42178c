// Steps x sites as a grid that is walked with the arrow keys; a step's panel beside it.

const WORDS = { C: "compute", R: "reuse", F: "forecast", T: "refresh" };
const LEGEND = [
  ["compute", "C", "computed"],
  ["reuse", "R", "an earlier value is used"],
  ["forecast", "F", "a sum of earlier values"],
  ["refresh", "T", "some tokens are computed anew"],
  ["mixed", "0-9", "tenths of these sites compute"],
];

const cellOf = (step, site) => plan.cells[plan.rows[step][site]];

/** What a step does at some sites, in words. */
function cellWords(step, sites) {
  const cells = sites.map((site) => cellOf(step, site));
  const words = [...grouped(cells, (one) => one.action)].map(([action, found]) => {
    const from = [...new Set(found.flatMap((one) => one.from || []))].sort((a, b) => a - b);
    const tokens = found.map((one) => one.tokens).filter((one) => one !== undefined);
    let text = found.length === cells.length ? action : `${action} (${found.length} of ${cells.length})`;
    if (tokens.length) {
      const [least, most] = [Math.min(...tokens), Math.max(...tokens)];
      text += ` ${least === most ? least : `${least} to ${most}`} tokens`;
    }
    if (from.length) text += ` from step${from.length > 1 ? "s" : ""} ${ranges(from)}`;
    return text;
  });
  return words.join("; ");
}

function cellFacts(step, sites) {
  const flops = total(sites.map((site) => cellOf(step, site).flops));
  const kept = plan.kept.filter((one) => one.made === step);
  const bytes = total(kept.map((one) => {
    const here = one.sites.filter((site) => sites.includes(site)).length;
    return (one.bytes * here) / one.sites.length;
  }));
  const last = Math.max(-1, ...kept.filter((one) => one.sites.some((site) => sites.includes(site))).map((one) => one.last));
  return `${amount(flops)} FLOPs; ` + (bytes ? `keeps ${size(bytes)} until step ${last}` : "keeps nothing");
}

function planView(section) {
  const status = h("div", { class: "panel", role: "status", id: "cell" }, h("p", null, "Point at a cell, or walk there with the arrow keys."));
  const panel = h("div", { class: "panel", id: "step" });
  const grid = h("table", { class: "plan", role: "grid", "aria-label": "What each step does at each site" });
  const used = new Set(plan.groups.flatMap((group) => [...group.cells].map((one) => WORDS[one] || "mixed")));
  section.append(
    h("h2", null, "Plan: steps from left to right, sites from top to bottom"),
    h("p", { class: "hint" }, "Arrow keys move, Enter shows a step below, + unfolds the sites of a row."),
    h("ul", { class: "legend" }, LEGEND.filter(([action]) => used.has(action)).map(([action, letter, words]) =>
      h("li", null, h("span", { class: `key ${action}` }, letter), words))),
    wide("the plan, scrollable", grid, "scroll"), status, panel,
    h("details", null, h("summary", null, "Schedule"), h("div", { class: "inside" }, wide("the schedule", h("pre", { class: "schedule" }, data.schedule)))));
  drawGrid(grid, status, (step) => showStep(panel, grid, step));
  showStep(panel, grid, 0);
}

function drawGrid(grid, status, choose) {
  const steps = [...Array(plan.steps).keys()];
  grid.append(h("thead", null, h("tr", null,
    h("th", { scope: "col" }, "step"),
    steps.map((step) => h("th", { scope: "col", "aria-label": `step ${step}` }, step % 5 === 0 ? String(step) : "")))));
  const body = h("tbody");
  grid.append(body);
  const cell = (step, letter, sites, name) => h("td", {
    role: "gridcell", tabindex: -1, class: WORDS[letter] || "mixed", "data-step": step,
    "data-sites": sites.join(" "), "data-name": name,
    "aria-label": `${name}, step ${step}: ${cellWords(step, sites)}`,
  }, letter);
  const line = (name, count, sites, letters, inner) => h("tr", { class: inner ? "inner" : null },
    h("th", { scope: "row" }, inner || count < 2 ? null : unfolder(name, sites), name, count > 1 ? ` (${count})` : ""),
    steps.map((step) => cell(step, letters[step], sites, name)));
  const unfolder = (name, sites) => h("button", {
    "aria-expanded": "false", "aria-label": `unfold ${name}`,
    onclick: (event) => unfold(event.currentTarget, sites),
  }, "+");
  function unfold(button, sites) {
    const row = button.closest("tr");
    const open = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!open));
    button.textContent = open ? "+" : "-";
    if (open) {
      while (row.nextSibling && row.nextSibling.classList.contains("inner")) row.nextSibling.remove();
      return;
    }
    row.after(...sites.map((site) => {
      const letters = steps.map((step) => LETTERS[cellOf(step, site).action]);
      return line(plan.sites[site].name, 1, [site], letters, true);
    }));
  }
  for (const group of plan.groups) body.append(line(group.label, group.sites.length, group.sites, group.cells, false));
  body.append(h("tr", { class: "variants" }, h("th", { scope: "row" }, "variant"),
    steps.map((step) => h("td", { role: "gridcell", tabindex: -1, "data-step": step, "data-name": "variant", "aria-label": `step ${step} runs ${variantOf(step).name}` }, String(plan.variant_of[step])))));
  body.querySelector("td").tabIndex = 0;
  walk(grid, status, choose);
}

const LETTERS = { compute: "C", reuse: "R", forecast: "F", refresh: "T" };

function walk(grid, status, choose) {
  const say = (cell) => {
    const step = +cell.dataset.step;
    if (!cell.dataset.sites) {
      replace(status, h("p", null, `Step ${step} runs ${variantOf(step).name}.`));
      return;
    }
    const sites = cell.dataset.sites.split(" ").map(Number);
    replace(status,
    h("p", null, h("strong", null, `Step ${step}, ${cell.dataset.name}`), ": ", cellWords(step, sites)),
      h("p", { class: "faint" }, cellFacts(step, sites)));
  };
  grid.addEventListener("mouseover", (event) => event.target.dataset.step && say(event.target));
  grid.addEventListener("focusin", (event) => event.target.dataset.step && say(event.target));
  grid.addEventListener("click", (event) => event.target.dataset.step && choose(+event.target.dataset.step));
  grid.addEventListener("keydown", (event) => {
    const cell = event.target;
    if (!cell.dataset.step) return;
    if (event.key === "Enter" || event.key === " ") {
      choose(+cell.dataset.step);
      event.preventDefault();
      return;
    }
    const row = cell.parentElement, at = [...row.children].indexOf(cell);
    const aims = {
      ArrowLeft: row.children[at - 1], ArrowRight: row.children[at + 1],
      ArrowUp: row.previousElementSibling?.children[at], ArrowDown: row.nextElementSibling?.children[at],
      Home: row.children[1], End: row.lastElementChild,
    };
    const aim = aims[event.key];
    if (!aim || !aim.dataset.step) return;
    event.preventDefault();
    grid.querySelectorAll("td[tabindex='0']").forEach((one) => { one.tabIndex = -1; });
    aim.tabIndex = 0;
    aim.focus();
  });
}

/** The panel of a step: what it computes, reads, keeps and frees. */
function showStep(panel, grid, step) {
  const variant = variantOf(step), cost = data.cost;
  grid.querySelectorAll(".chosen").forEach((one) => one.classList.remove("chosen"));
  grid.querySelectorAll(`td[data-step="${step}"]`).forEach((one) => one.classList.add("chosen"));
  const does = plan.groups.map((group) => [group.label, group.sites]);
  const lives = (kept) => `${kept.what === "value" ? "values" : kept.what} of ${common(kept.sites.map((i) => plan.sites[i].name))}`;
  const made = plan.kept.filter((one) => one.made === step);
  const freed = plan.kept.filter((one) => one.last === step);
  const rows = [
    ["runs", h("span", null, `${variant.name} `, h("button", { onclick: () => openGraph(variant.name) }, "show its graph"))],
    ["FLOPs", `${amount(cost.flops[step])}, ${percent(cost.flops[step], cost.full_flops)} of a full step`],
    ...does.map(([label, sites]) => [label, cellWords(step, sites)]),
    ["keeps", made.length ? made.map((one) => `${lives(one)}, ${size(one.bytes)}, until step ${one.last}`).join("; ") : "nothing"],
    ["frees", freed.length ? freed.map((one) => `${lives(one)} of step ${one.made}, ${size(one.bytes)}`).join("; ") : "nothing"],
    ["kept after it", size(cost.cache_bytes[step])],
  ];
  replace(panel, h("h3", null, `Step ${step}`),
    h("table", { class: "list" }, h("tbody", null, rows.map(([name, value]) => h("tr", null, h("th", { scope: "row" }, name), h("td", null, value))))));
}
