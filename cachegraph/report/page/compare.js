// Two variants side by side: what the one leaves out of the other.

/** Blocks that differ in the same way, with their nodes in both variants. */
function differences(before, after) {
  const at = (variant) => new Map(variant.sections.flatMap((section, index) => section.blocks.map((block) => [block, index])));
  const first = at(before), second = at(after);
  const blocks = [...new Set([...first.keys(), ...second.keys()])];
  const pairs = grouped(blocks, (block) => `${first.get(block)} ${second.get(block)}`);
  return [...pairs.values()].map((group) => {
    const nodes = (variant, places) => (places.has(group[0]) ? variant.sections[places.get(group[0])].nodes : []);
    return { blocks: group, before: nodes(before, first), after: nodes(after, second) };
  }).filter((one) => one.before.map((n) => n.form).join() !== one.after.map((n) => n.form).join());
}

/** Lines of a difference: the longest common subsequence stays. */
function lineDiff(before, after) {
  const rows = before.length, columns = after.length;
  const longest = Array.from({ length: rows + 1 }, () => new Uint16Array(columns + 1));
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      longest[i][j] = before[i].form === after[j].form ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
    }
  }
  const lines = [];
  let i = 0, j = 0;
  while (i < rows || j < columns) {
    if (i < rows && j < columns && before[i].form === after[j].form) {
      lines.push(["same", after[j]]);
      i += 1;
      j += 1;
    } else if (i < rows && (j === columns || longest[i + 1][j] >= longest[i][j + 1])) {
      lines.push(["minus", before[i]]);
      i += 1;
    } else {
      lines.push(["plus", after[j]]);
      j += 1;
    }
  }
  return lines;
}

/** Operations and FLOPs by kind of module: blocks.*.attn.qkv. */
function byModule(variant) {
  const found = new Map();
  for (const section of variant.sections) {
    for (const node of section.nodes) {
      const block = section.blocks[0].replace(/\d+/g, "*");
      const name = [block, node.module].filter(Boolean).join(".") || "(the model itself)";
      const one = found.get(name) || { count: 0, flops: 0 };
      one.count += section.blocks.length;
      one.flops += (node.flops || 0) * section.blocks.length * (node.tokens ? variantTokens(variant) : 1);
      found.set(name, one);
    }
  }
  return found;
}

/** Tokens that a step of the variant recomputes, on average over its steps and sites. */
function variantTokens(variant) {
  const counts = variant.steps.flatMap((step) => plan.rows[step].map((cell) => plan.cells[cell].tokens).filter((one) => one !== undefined));
  return counts.length ? total(counts) / counts.length : 1;
}

function compareView(section) {
  const choose = (id, label, chosen) => {
    const choice = h("select", { id }, data.variants.map((one, i) => h("option", { value: i, selected: i === chosen }, `${one.name}: steps ${ranges(one.steps)}`)));
    return [choice, h("label", { for: id }, label, choice)];
  };
  const [first, firstLabel] = choose("first", "This variant", 0);
  const [second, secondLabel] = choose("second", "and that one", Math.min(1, data.variants.length - 1));
  const shown = h("div");
  section.append(h("h2", null, "Compare: what one variant leaves out of another"), h("div", { class: "controls" }, firstLabel, secondLabel), shown);
  const draw = () => drawComparison(shown, data.variants[first.value], data.variants[second.value]);
  first.addEventListener("change", draw);
  second.addEventListener("change", draw);
  draw();
}

function drawComparison(shown, before, after) {
  const found = differences(before, after);
  if (!found.length) {
    replace(shown, h("p", null, "They do not differ."));
    return;
  }
  const one = byModule(before), other = byModule(after);
  const rows = [...new Set([...one.keys(), ...other.keys()])].map((name) => [name, one.get(name) || { count: 0, flops: 0 }, other.get(name) || { count: 0, flops: 0 }])
    .filter(([, a, b]) => a.count !== b.count || a.flops !== b.flops);
  const cost = data.cost.full_flops;
  replace(shown,
    h("p", null, `${before.name}: ${amount(before.flops)} FLOPs a call (${percent(before.flops, cost)} of a full step); ${after.name}: ${amount(after.flops)} (${percent(after.flops, cost)}).`),
    table("Where they differ, by kind of module", ["module", `operations in ${before.name}#`, `in ${after.name}#`, `FLOPs in ${before.name}#`, `in ${after.name}#`],
      rows.map(([name, a, b]) => [h("code", null, name), String(a.count), String(b.count), amount(a.flops), amount(b.flops)])),
    h("h3", null, "By block, blocks that differ alike once"),
    h("ul", { class: "legend" }, h("li", null, h("span", { class: "strip" }, h("i", { class: "gone" })), ` only in ${before.name}`), h("li", null, h("span", { class: "strip" }, h("i", { class: "new" })), ` only in ${after.name}`)),
    found.map((change) => drawChange(change, before, after)));
}

function drawChange(change, before, after) {
  const lines = lineDiff(change.before, change.after);
  const only = (kind) => new Set(lines.filter(([one]) => one === kind).map(([, node]) => node));
  const gone = only("minus"), made = only("plus");
  const text = ([kind, node]) => h("span", { class: kind }, `${{ same: " ", minus: "-", plus: "+" }[kind]} %${node.name} = ${node.text}  ${node.spec || ""}`);
  const label = common(change.blocks) || "the model itself";
  const row = (name, nodes, kind) => h("div", null, h("span", { class: "faint" }, name), strip(nodes, kind));
  return h("details", null,
    h("summary", null, h("strong", null, label), change.blocks.length > 1 ? ` (${change.blocks.length} alike)` : "", `: ${gone.size} left out, ${made.size} new`,
      row(before.name, change.before, (node) => (gone.has(node) ? "gone" : "")),
      row(after.name, change.after, (node) => (made.has(node) ? "new" : ""))),
    h("div", { class: "inside" }, h("pre", { class: "diff" }, lines.map(text))));
}
