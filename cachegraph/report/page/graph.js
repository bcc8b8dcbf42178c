// A variant's graph: what goes in and out, its blocks folded, what the passes removed, a search.

/** Shows the graph of a variant, whichever view is open. */
function openGraph(name) {
  showView("graphs");
  const choice = document.getElementById("variant");
  choice.value = name;
  choice.dispatchEvent(new Event("change"));
  choice.focus();
}

/** The sections of a graph, each folded until it is opened. */
function sections(found, name) {
  return found.map((section, index) => {
    const inside = h("div", { class: "inside" });
    const flops = total(section.nodes.map((node) => node.flops || 0));
    const alike = section.blocks.length > 1 ? `, ${section.blocks.length} alike` : "";
    const cost = flops ? `, ${amount(flops)} FLOPs each` : "";
    const details = h("details", { "data-section": `${name}:${index}` },
      h("summary", null, h("strong", null, section.label), ` ${plural(section.nodes.length, "operation")}${alike}${flops ? cost : ""}`, strip(section.nodes)), inside);
    details.addEventListener("toggle", () => {
      if (details.open && !inside.children.length) inside.append(nodeTable(section));
    });
    return details;
  });
}

/** One small box a node, coloured by what it has to do with the cache. */
function strip(nodes, kind) {
  const heavy = Math.max(...nodes.map((node) => node.flops || 0));
  return h("div", { class: "strip", "aria-hidden": "true" }, nodes.map((node) => {
    const mark = node.marks ? MARKS[node.marks[0]][0] : "";
    const extra = kind ? kind(node) : "";
    return h("i", { class: [mark, node.flops > heavy / 20 ? "heavy" : "", extra].join(" ").trim() || null, title: node.text });
  }));
}

function nodeTable(section) {
  const rows = [];
  let module = null;
  for (const node of section.nodes) {
    if (node.module !== module) {
      module = node.module;
      rows.push(h("tr", { class: "module" }, h("th", { colspan: 5, scope: "rowgroup" }, module || "in the block itself")));
    }
    rows.push(h("tr", { "data-node": node.name },
      h("td", { class: "code" }, `%${node.name}`),
      h("td", { class: "code" }, node.text),
      h("td", { class: "code" }, node.spec || ""),
      h("td", null, node.flops ? `${amount(node.flops)}${node.tokens ? " a token" : ""}` : ""),
      h("td", null, [...(node.marks || "")].map((mark) => h("span", { class: `tag ${MARKS[mark][0]}` }, MARKS[mark][1])), node.made_by ? ` by ${node.made_by}` : "")));
  }
  return wide(`operations of ${section.label}`, h("table", { class: "nodes" },
    h("thead", null, h("tr", null, ["node", "operation", "shape", "FLOPs", "cache, provenance"].map((one) => h("th", { scope: "col" }, one)))),
    h("tbody", null, rows)));
}

function ports(title, found) {
  return [h("h3", null, title), table("", ["name", "shape", "what it is for"],
    found.map((port) => [h("code", null, port.label), h("code", null, port.spec), port.why]))];
}

function removed(variant) {
  const told = variant.passes.filter((one) => one.removed.length);
  if (!told.length) return h("p", null, "No module was removed.");
  return h("ul", null, told.map((one) => {
    const where = one.name === "hoist-known" ? "moved to the prologue" : "removed";
    return h("li", null, h("strong", null, one.name), ` ${where} ${plural(one.removed.length, "module")}: `, h("code", null, common(one.removed)));
  }));
}

function graphView(section) {
  const choice = h("select", { id: "variant" }, data.variants.map((one) =>
    h("option", { value: one.name }, `${one.name}: steps ${ranges(one.steps)}`)));
  const query = h("input", { type: "search", id: "query", placeholder: "blocks.3.attn.qkv, add_7, softmax", autocomplete: "off" });
  const results = h("div", { id: "results", role: "status" });
  const shown = h("div");
  section.append(h("h2", null, "Graphs: one a variant"),
    h("div", { class: "controls" },
      h("label", { for: "variant" }, "Variant", choice),
      h("label", { for: "query" }, "Find a node, module or operation in all variants", query)),
    results, shown);
  const draw = () => drawVariant(shown, data.variants.find((one) => one.name === choice.value));
  choice.addEventListener("change", draw);
  query.addEventListener("input", () => search(results, query.value.trim(), (name, node) => {
    choice.value = name;
    draw();
    reveal(shown, name, node);
  }));
  draw();
}

function drawVariant(shown, variant) {
  const marks = Object.values(MARKS).map(([kind, words]) => h("li", null, h("span", { class: `key ${kind}` }, "\u00a0"), words));
  const before = variant.prologue ? data.prologues[variant.prologue] : [];
  const once = data.prologues.request || [];
  const open = () => shown.querySelectorAll("details").forEach((one) => { one.open = true; });
  replace(shown,
    h("p", null, `${variant.name} runs at ${plural(variant.steps.length, "step")} (${ranges(variant.steps)}), ${amount(variant.flops)} FLOPs a call, ${percent(variant.flops, data.cost.full_flops)} of a full step.`),
    h("div", { class: "sides" },
      h("div", null,
        ports("Inputs", variant.inputs), ports("Outputs", variant.outputs),
        h("h3", null, "Operations, by block ", h("button", { onclick: open }, "unfold all")),
        h("ul", { class: "legend" }, marks, h("li", { class: "faint" }, "each box is an operation; underlined: much of the FLOPs")),
        sections(variant.sections, variant.name)),
      h("div", null,
        h("h3", null, "What the passes removed"), removed(variant),
        passes(variant),
        h("h3", null, "Prologue: before the first step"),
        once.length + before.length ? null : h("p", null, "There is none: nothing is known beforehand that is worth keeping."),
        once.length ? [h("p", { class: "hint" }, "Once a trajectory, the same for every step:"), sections(once, "request")] : null,
        before.length ? [h("p", { class: "hint" }, "Once a trajectory, for all steps at once:"), sections(before, variant.prologue)] : null)));
}

function passes(variant) {
  if (!variant.passes.length) return h("p", { class: "faint" }, "This artifact does not say what each pass did; compile it again to know.");
  return table("What each pass did", ["pass", "rewrites#", "nodes before#", "after#"],
    variant.passes.map((one) => [one.name, String(one.rewrites), String(one.nodes[0]), String(one.nodes[1])]));
}

/** Opens the section that a node is in, and marks the node. */
function reveal(shown, name, node) {
  const variant = data.variants.find((one) => one.name === name);
  const index = variant.sections.findIndex((one) => one.nodes.includes(node));
  const details = shown.querySelector(`details[data-section="${CSS.escape(`${name}:${index}`)}"]`);
  if (!details) return;
  details.open = true;
  const inside = details.querySelector(".inside");
  if (!inside.children.length) inside.append(nodeTable(variant.sections[index]));
  const row = inside.querySelector(`[data-node="${CSS.escape(node.name)}"]`);
  shown.querySelectorAll(".found").forEach((one) => one.classList.remove("found"));
  row.classList.add("found");
  row.scrollIntoView({ block: "center" });
}

/** Where a text occurs: a module of a folded block is found under each block's name. */
function search(results, text, go) {
  results.replaceChildren();
  if (text.length < 2) return;
  const wanted = text.toLowerCase();
  const rows = data.variants.map((variant) => {
    const found = [];
    for (const section of variant.sections) {
      const [first] = section.blocks;
      for (const node of section.nodes) {
        const inner = node.module ? `.${node.module}` : "";
        const paths = section.blocks.map((block) => (block + inner).replace(/^\./, ""));
        const texts = [node.name, node.text, ...paths, ...(first ? section.blocks.map((block) => node.text.replaceAll(`@${first}.`, `@${block}.`)) : [])];
        if (texts.some((one) => one.toLowerCase().includes(wanted))) found.push(node);
      }
    }
    const gone = variant.passes.filter((one) => one.removed.some((path) => path.toLowerCase().includes(wanted)));
    const words = gone.map((one) => {
      const paths = one.removed.filter((path) => path.toLowerCase().includes(wanted));
      return h("p", null, h("code", null, common(paths)), one.name === "hoist-known" ? " moved to the prologue by " : " removed by ", h("strong", null, one.name));
    });
    return [variant.name, h("div", null,
      found.length ? h("p", null, `${plural(found.length, "operation")}: `, found.slice(0, 12).map((node) => [h("button", { onclick: () => go(variant.name, node) }, node.name), " "]), found.length > 12 ? `and ${found.length - 12} more` : "") : null,
      words, found.length + words.length ? null : "not in it")];
  });
  results.append(table(`Where "${text}" is`, ["variant", "found"], rows));
}
