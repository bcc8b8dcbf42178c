// The page: facts, tabs, and views that are drawn when they are first looked at.

const hasTokens = plan.cells.some((one) => one.tokens !== undefined);
const VIEWS = [
  ["plan", "Plan", planView, true],
  ["graphs", "Graphs", graphView, true],
  ["compare", "Compare", compareView, data.variants.length > 1],
  ["cost", "Cost", costView, true],
  ["tokens", "Tokens", tokensView, hasTokens],
  ["quality", "Quality", qualityView, data.quality !== null],
].filter(([, , , there]) => there);
const drawn = new Set();

function showView(name) {
  for (const [id, , draw] of VIEWS) {
    const section = document.getElementById(id), tab = document.getElementById(`tab-${id}`);
    const chosen = id === name;
    section.hidden = !chosen;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) drawOnce(id, draw, section);
  }
}

/** Shows a view that was chosen; reloading the page comes back to it. */
function remember(name) {
  showView(name);
  history.replaceState(null, "", `#${name}`);
}

function drawOnce(id, draw, section) {
  if (drawn.has(id)) return;
  drawn.add(id);
  draw(section);
}

function start() {
  document.title = `${data.title} - cachegraph`;
  document.getElementById("title").textContent = data.title;
  const cost = data.cost, most = Math.max(...cost.cache_bytes);
  const facts = [
    ["steps", `${plan.steps}, ${plan.full_steps} full`], ["sites", String(plan.sites.length)], ["variants", String(data.variants.length)],
    ["FLOPs", `${amount(cost.total_flops)} of ${amount(cost.uncached_flops)}`], ["limit", `${cost.speed_up_limit.toFixed(2)}x by FLOPs`],
    ["cache", most ? `at most ${size(most)}` : "none"], ["weights", size(cost.weight_bytes)], ["for", data.batch],
  ];
  document.getElementById("facts").append(...facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))));
  const tabs = document.getElementById("tabs"), views = document.getElementById("views");
  views.replaceChildren();
  for (const [id, label] of VIEWS) {
    tabs.append(h("button", { role: "tab", id: `tab-${id}`, "aria-controls": id, "aria-selected": "false", tabindex: -1, onclick: () => remember(id) }, label));
    views.append(h("section", { role: "tabpanel", id, "aria-labelledby": `tab-${id}`, hidden: true }));
  }
  tabs.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const at = VIEWS.findIndex(([id]) => `tab-${id}` === document.activeElement.id);
    const [next] = VIEWS[(at + by + VIEWS.length) % VIEWS.length];
    remember(next);
    document.getElementById(`tab-${next}`).focus();
  });
  window.addEventListener("beforeprint", () => VIEWS.forEach(([id, , draw]) => drawOnce(id, draw, document.getElementById(id))));
  const asked = location.hash.slice(1);
  showView(VIEWS.some(([id]) => id === asked) ? asked : "plan");
}

start();
