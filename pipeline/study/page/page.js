"use strict";
// The page of a sweep. Columns are unpacked, cells are filtered, recipes are averaged and pictures are drawn, all here:
// a filter acts on every picture at once. Values are in points: per cent, or 100 times the natural logarithm of a
// metric that is compared on a log axis. A recipe is everything but the seed; every mean is over recipes.

let DATA; // {parts, styles, enough, shown}, see `start`
let ENOUGH; // pairs, below which nothing is claimed
let SHOWN; // values, below which no interval and no correlation is shown
const TYPES = { f4: Float32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
const COLOR = { fold: "#0072b2", prune: "#d55e00", base: "#6b7280", gap: "#1b1f24" };
const WORD = { fold: "best folding", prune: "best pruning", base: "uncompressed", gap: "gap" };
const OUTCOMES = ["fold", "base", "gap"]; // of an effect, the headline first
const ROWS = 40; // of a forest plot, and of the table before more are asked for
// Without the bar of tools, which lies over titles wherever there is no mouse; png/ has the pictures as files.
const CONFIG = { displayModeBar: false, responsive: true };
const state = { part: 0, stages: new Set(), ratio: 0, out: [], map: null, axes: null, brushed: null, sort: null, rows: ROWS };
let view;

// ---- Columns

function bytesOf(text) {
  const letters = atob(text);
  const bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  return bytes;
}

const column = ([type, text]) => new TYPES[type](bytesOf(text).buffer);

/** The text of an element that holds it compressed, in base64. */
const inflated = (id) => new Response(new Blob([bytesOf(document.getElementById(id).textContent)]).stream().pipeThrough(new DecompressionStream("gzip"))).text();

function unpacked(part) {
  if (part.empty || part.starts) return part;
  for (const table of ["cells", "rows", "sizes", "speeds"])
    for (const [name, value] of Object.entries(part[table] ?? {}))
      if (Array.isArray(value)) part[table][name] = typeof value[0] === "string" ? column(value) : value.map(column);
  for (const name of ["at", "cell", "fold", "prune"]) part.lines[name] = column(part.lines[name]);
  if (!part.prediction.reason) for (const name of ["cell", "fold", "said"]) part.prediction[name] = column(part.prediction[name]);
  for (const one of [...part.numbers, ...part.lines.left]) one.values = column(one.values);
  part.ats = part.ratios.length + 1; // codes of one stage: its ratios, then the area
  part.starts = new Map(); // where the lines of a stage and ratio begin
  part.lines.at.forEach((at, i) => part.starts.has(at) || part.starts.set(at, i));
  return part;
}

// ---- Statistics

function logGamma(x) { // Lanczos, g = 5 (Numerical Recipes, section 6.1)
  const c = [76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155, 0.001208650973866179, -0.000005395239384953];
  const sum = c.reduce((total, value, i) => total + value / (x + 1 + i), 1.000000000190015);
  return (x + 0.5) * Math.log(x + 5.5) - x - 5.5 + Math.log((2.5066282746310005 * sum) / x);
}

function incompleteBeta(x, a, b) { // continued fraction, modified Lentz (Numerical Recipes, section 6.4)
  if (x <= 0 || x >= 1) return x <= 0 ? 0 : 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log(1 - x)) / a;
  let c = 1, d = 1 / (1 - ((a + b) * x) / (a + 1)), value = d;
  for (let m = 1; m < 300; m++) {
    for (const step of [(m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m)), (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1))]) {
      d = 1 / (1 + step * d);
      c = 1 + step / c;
      value *= c * d;
    }
    if (Math.abs(c * d - 1) < 1e-12) break;
  }
  return front * value;
}

/** Probability that Student's t with df degrees of freedom is further from 0 than t. */
const twoSided = (t, df) => incompleteBeta(df / (df + t * t), df / 2, 0.5);

const quantiles = new Map();
/** Student's t that is exceeded, either way, with probability .05. */
function quantile(df) {
  if (!quantiles.has(df)) {
    let low = 0, high = 20;
    for (let i = 0; i < 60; i++) {
      const middle = (low + high) / 2;
      if (twoSided(middle, df) > 0.05) low = middle;
      else high = middle;
    }
    quantiles.set(df, low);
  }
  return quantiles.get(df);
}

/** {n, mean, sd, half}: of the values that are numbers; half of the 95% interval of the mean from `least` values on. */
function summary(values, least = SHOWN) {
  const there = values.filter((value) => !Number.isNaN(value));
  const n = there.length;
  const mean = there.reduce((total, value) => total + value, 0) / n;
  const sd = n > 1 ? Math.sqrt(there.reduce((total, value) => total + (value - mean) ** 2, 0) / (n - 1)) : NaN;
  return { n, mean, sd, half: n >= least ? (quantile(n - 1) * sd) / Math.sqrt(n) : NaN };
}

/** Fewest values of this spread whose 95% interval is one point or less either way. */
function needed(sd) {
  if (!(sd > 0)) return 2;
  let n = Math.max(2, Math.floor((1.96 * sd) ** 2));
  while ((quantile(Math.min(n - 1, 5000)) * sd) / Math.sqrt(n) > 1) n++;
  return n;
}

/** Holm's correction: adjusts p in place as p_holm, over the rows that have one (Holm 1979). */
function holm(rows) {
  const tested = rows.filter((row) => !Number.isNaN(row.p)).sort((a, b) => a.p - b.p);
  let highest = 0;
  tested.forEach((row, i) => {
    highest = Math.max(highest, Math.min(1, (tested.length - i) * row.p));
    row.p_holm = highest;
  });
}

// ---- Recipes

function kept(part) {
  const keep = new Uint8Array(part.names.length).fill(1);
  state.out.forEach((out, s) => {
    if (out.size) part.cells.settings[s].forEach((code, cell) => out.has(code) && (keep[cell] = 0));
  });
  return keep;
}

/** The recipes of a stage and ratio: {recipe, cells, lines: places in part.lines, cell: the first, each: {outcome: values of the cells}, outcome: mean}. */
function recipesAt(part, keep, stage, ratio) {
  const at = stage * part.ats + ratio, { cell, fold, prune } = part.lines, found = [];
  const up = part.metric.higher_is_better ? 1 : -1;
  for (let i = part.starts.get(at) ?? Infinity; part.lines.at[i] === at; i++) {
    const c = cell[i], recipe = part.cells.recipe[c];
    if (!keep[c]) continue;
    if (found.at(-1)?.recipe !== recipe) found.push({ cell: c, recipe, cells: [], lines: [], each: { fold: [], prune: [], base: [], gap: [] } });
    const one = found.at(-1);
    one.cells.push(c);
    one.lines.push(i);
    const values = { fold: fold[i], prune: prune[i], base: part.cells.base[c], gap: up * (fold[i] - prune[i]) };
    for (const [name, value] of Object.entries(values)) one.each[name].push(value);
  }
  for (const one of found) for (const [name, values] of Object.entries(one.each)) one[name] = summary(values).mean;
  return found;
}

/** Per stage, ratio and method: the recipes' means, the number of cells, and the share of parameters and MACs left. */
function curves(part, keep) {
  const { at, method, cell, value, size } = part.rows, { params, macs } = part.sizes, groups = new Map();
  let group = { key: -1, recipe: -1 }, sum = 0, count = 0;
  const close = () => {
    if (count) group.values.push(sum / count);
    sum = count = 0;
  };
  for (let i = 0; i < cell.length; i++) {
    const c = cell[i], key = at[i] * part.methods.length + method[i], dense = part.cells.size[c];
    if (!keep[c]) continue;
    if (key !== group.key || part.cells.recipe[c] !== group.recipe) close();
    if (key !== group.key) groups.set(key, (group = { key, values: [], cells: 0, params: 0, macs: 0 }));
    group.recipe = part.cells.recipe[c];
    group.cells++;
    group.params += params[size[i]] / params[dense];
    group.macs += macs[size[i]] / macs[dense];
    sum += value[i];
    count++;
  }
  close();
  for (const one of groups.values()) {
    Object.assign(one, summary(one.values));
    one.params /= one.cells;
    one.macs /= one.cells;
  }
  return groups;
}

/**
 * Effects by matched pairs: recipes that differ in one setting only. Neighbouring levels are compared, and the first with
 * the last. Where an effect changes its sign over another setting, its halves stand in place of the mean.
 */
function effects(part, recipes) {
  const settings = independent(part, recipes).map(({ s }) => s);
  const groups = settings.map((s) => ({ s, ...grouped(part, recipes, settings, s) }));
  const steps = groups.flatMap(({ s, alike, steps }) => steps.map(([low, high]) => {
    const pairs = alike.filter((group) => group.has(low) && group.has(high)).map((group) => [group.get(low), group.get(high)]);
    return { s, low, high, pairs, others: groups.filter((other) => other.s !== s) };
  }));
  return OUTCOMES.flatMap((outcome) => {
    const flipped = flips(part, steps, outcome);
    const rows = steps.flatMap((step, i) => {
      const { s, low, high, pairs } = step, there = pairs.filter((pair) => !Number.isNaN(change(pair, outcome))), over = flipped[i];
      const parts = over === undefined ? [there] : [...Map.groupBy(there, ([one]) => part.cells.settings[over][one.cell]).values()];
      return parts.filter((own) => own.length).map((own) => ({ setting: part.settings[s].name, low: part.settings[s].levels[low], high: part.settings[s].levels[high], outcome, where: bound(part, recipes, settings, s, own, over), ...tested(own, outcome) }));
    });
    holm(rows);
    return rows;
  });
}

/** For each step the setting over which its effect most surely changes its sign; undefined where it does over none. */
function flips(part, steps, outcome) {
  const splits = steps.flatMap(({ pairs, others }, step) => others.flatMap((other) => {
    const at = Map.groupBy(pairs, ([low]) => part.cells.settings[other.s][low.cell]);
    return other.steps.map((levels) => levels.map((level) => at.get(level) ?? [])).filter((both) => Math.min(...both.map((half) => half.length)) > 1).map((both) => {
      const [a, b] = both.map((half) => tested(half, outcome, 2)), turned = a.mean * b.mean < 0, p = Math.max(a.p, b.p);
      return { step, s: other.s, sure: turned && Math.abs(a.mean) > a.half && Math.abs(b.mean) > b.half, p: turned ? p : Number.isNaN(p) ? NaN : 1 };
    });
  }));
  holm(splits);
  const found = [];
  for (const split of splits) if (split.sure && !(found[split.step]?.p_holm <= split.p_holm)) found[split.step] = split;
  return steps.map((_, i) => found[i]?.s);
}

const change = ([low, high], outcome) => high[outcome] - low[outcome];

/** summary of the differences of pairs, and p: two-sided, of a mean of 0. */
function tested(pairs, outcome, least = SHOWN) {
  const found = summary(pairs.map((pair) => change(pair, outcome)), least);
  const p = found.n < 2 ? NaN : found.sd ? twoSided((found.mean / found.sd) * Math.sqrt(found.n), found.n - 1) : +!found.mean;
  return { ...found, p };
}

/** [{s: place of a setting, along: names}]: settings that split the recipes in the same way are one, if one can be, one that no recipe lacks. */
function independent(part, recipes) {
  const groups = new Map();
  part.settings.forEach(({ levels }, s) => {
    const codes = recipes.map((one) => part.cells.settings[s][one.cell]), first = new Map();
    codes.forEach((code, i) => first.has(code) || first.set(code, i));
    const split = codes.map((code) => first.get(code)).join();
    const lacking = codes.some((code) => levels[code] === "-");
    if (first.size > 1) groups.set(split, [...(groups.get(split) ?? []), { s, lacking }]);
  });
  return [...groups.values()].map((group) => {
    const { s } = group.find((one) => !one.lacking) ?? group[0];
    return { s, along: group.filter((one) => one.s !== s).map((one) => part.settings[one.s].name) };
  });
}

/** {alike: recipes that differ in one setting, by its level; steps: the levels to compare}. */
function grouped(part, recipes, settings, s) {
  const others = settings.filter((other) => other !== s).map((other) => part.cells.settings[other]), groups = new Map();
  for (const one of recipes) {
    const key = others.map((codes) => codes[one.cell]).join();
    if (!groups.has(key)) groups.set(key, new Map());
    groups.get(key).set(part.cells.settings[s][one.cell], one);
  }
  const several = [...groups.values()].filter((group) => group.size > 1);
  const levels = [...new Set(several.flatMap((group) => [...group.keys()]))].sort((a, b) => a - b);
  const steps = levels.slice(1).map((level, i) => [levels[i], level]);
  return { alike: several, steps: levels.length > 2 ? [...steps, [levels[0], levels.at(-1)]] : steps };
}

/** "optim=sgd, lr=0.01 or 0.1": the levels of other settings that these pairs are bound to, where recipes have others. */
function bound(part, recipes, settings, s, pairs, over) {
  const level = (o, one) => part.cells.settings[o][one.cell], text = (o, code) => part.settings[o].levels[code], limits = new Map();
  for (const o of settings) {
    const there = new Set(pairs.map(([low]) => level(o, low)));
    if (o === over || (o !== s && recipes.some((one) => !there.has(level(o, one)) && text(o, level(o, one)) !== "-"))) limits.set(o, there);
  }
  const told = [...limits].filter(([o, there]) => [...there].some((code) => text(o, code) !== "-")); // the rest may follow from these
  const alike = recipes.filter((one) => told.every(([o, there]) => there.has(level(o, one))));
  const shown = [...limits].filter(([o]) => o === over || told.some(([other]) => other === o) || alike.some((one) => text(o, level(o, one)) !== "-"));
  return shown.map(([o, there]) => `${part.settings[o].name}=${[...there].sort((a, b) => a - b).map((code) => text(o, code)).join(" or ")}`).join(", ");
}

/** Everything that the pictures draw for the chosen filters; a part of it is computed when first asked for. */
function viewed() {
  const part = unpacked(DATA.parts[state.part]);
  if (part.empty) return { part };
  const keep = kept(part), memo = new Map();
  const once = (key, make) => memo.has(key) ? memo.get(key) : memo.set(key, make()).get(key);
  return {
    part, keep,
    stages: [...state.stages].sort((a, b) => a - b),
    cells: keep.reduce((total, one) => total + one, 0),
    recipes: (stage, ratio = state.ratio) => once(`${stage} ${ratio}`, () => recipesAt(part, keep, stage, ratio)),
    effects: (stage) => once(`effects ${stage}`, () => effects(part, view.recipes(stage))),
    get curves() { return once("curves", () => curves(part, keep)); },
  };
}

// ---- Words and numbers

const cut = (text, length = 22) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
/** Text for Plotly, which reads tags and entities in its labels. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const label = (text, length) => plain(cut(text, length));
const metric = () => view.part.metric;
const value = (points) => (metric().log ? Math.exp(points / 100) : points);
const number = (points) => (Number.isNaN(points) ? "-" : metric().log ? value(points).toPrecision(4) : points.toFixed(metric().digits));
const unit = () => (metric().log ? "%" : metric().unit.trim() === "%" ? "points" : metric().unit.trim());
const signed = (points) => (Number.isNaN(points) ? "-" : `${points < 0 ? "−" : "+"}${Math.abs(points).toFixed(Math.max(1, metric().digits))}`);
const plusMinus = (half) => (Number.isNaN(half) ? "" : ` ± ${half.toFixed(Math.max(1, metric().digits))}`);
const ratioText = (ratio = state.ratio) => (ratio < view.part.ratios.length ? `ratio ${view.part.ratios[ratio]}` : "area under the curve");
const stageText = (stage) => view.part.stages[stage].title;
const better = () => (metric().higher_is_better ? "more is better" : "less is better");
const of = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
/** "12 pairs"; where there are too few for an interval, it says so. */
const counted = (n, word) => `${of(n, word)}${n < SHOWN ? " (n too small for an interval)" : ""}`;

// ---- Pictures: each gives a list of {data, layout} or {reason}

/** Margins that leave room for the legend of these traces, of which some four stand in a line. */
const below = (data) => ({ l: 60, r: 14, t: 56, b: 60 + 20 * Math.ceil(data.length / 4) });

/** The layout of a picture. beside: what stands below its title: the ratio, n. */
function base(title, beside, height, more = {}) {
  return {
    title: { text: `${title}<br><span style="font-size:12px;color:#5c6670">${beside}</span>`, font: { size: 14 }, x: 0, xref: "container", pad: { l: 4, t: 16 }, y: 1, yref: "container", yanchor: "top" },
    height, autosize: true, margin: { l: 60, r: 14, t: 56, b: 84 },
    font: { family: "system-ui, sans-serif", size: 12, color: "#1b1f24" },
    hovermode: "closest", legend: { orientation: "h", x: 0, xref: "container", y: 0, yref: "container", yanchor: "bottom" }, ...more,
  };
}

const axis = (title, more = {}) => ({ title: { text: title, standoff: 8 }, gridcolor: "#e5e9ee", zeroline: false, automargin: true, ...more });
const valueAxis = (title = plain(metric().heading)) => axis(title, metric().log ? { type: "log", dtick: "D1" } : {});
// An interval may reach below what a metric can be; the axis does not.
const fromZero = (data) => (!metric().log && data.every((trace) => trace.y.every((y) => y >= 0)) ? { minallowed: 0 } : {});
const bars = (all, shift = (x) => x) => ({
  type: "data", symmetric: false, thickness: 1.2, width: 3,
  array: all.map((s) => (Number.isNaN(s.half) ? 0 : shift(s.mean + s.half) - shift(s.mean))),
  arrayminus: all.map((s) => (Number.isNaN(s.half) ? 0 : shift(s.mean) - shift(s.mean - s.half))),
});
const style = (name) => DATA.styles[name];

function drawCurves() {
  const { part } = view;
  return view.stages.map((stage) => {
    const dense = summary(view.recipes(stage, part.ats - 1).map((one) => one.base));
    const data = part.methods.map((name, m) => {
      const ratios = part.ratios.map((_, r) => r).filter((r) => view.curves.has((stage * part.ats + r) * part.methods.length + m));
      const all = ratios.map((r) => view.curves.get((stage * part.ats + r) * part.methods.length + m));
      return {
        name: plain(name), x: ratios.map((r) => part.ratios[r]), y: all.map((s) => value(s.mean)), error_y: bars(all, value),
        text: all.map((s, i) => `${plain(name)}, ratio ${part.ratios[ratios[i]]}: ${number(s.mean)}${metric().log ? "" : plusMinus(s.half)}<br>${counted(s.n, "recipe")}, ${of(s.cells, "cell")}`),
        hovertemplate: "%{text}<extra></extra>", mode: "lines+markers", marker: { size: 6, color: style(name).color },
        line: { color: style(name).color, dash: style(name).dash, width: 2 },
      };
    }).filter((trace) => trace.x.length);
    if (!data.length) return { reason: `No cell that is kept has rows of the stage ${part.stages[stage].name}.` };
    if (dense.n) data.push({ name: `uncompressed ${number(dense.mean)}`, x: [0, part.ratios.at(-1)], y: [value(dense.mean), value(dense.mean)], mode: "lines", line: { color: COLOR.base, dash: "dot" }, hoverinfo: "name" });
    if (part.chance !== null) data.push({ name: `chance ${number(part.chance)}`, x: [0, part.ratios.at(-1)], y: [value(part.chance), value(part.chance)], mode: "lines", line: { color: COLOR.base, dash: "dash", width: 1 }, hoverinfo: "name" });
    const chosen = part.ratios[state.ratio];
    const shapes = chosen === undefined ? [] : [{ type: "line", x0: chosen, x1: chosen, yref: "paper", y0: 0, y1: 1, line: { color: "#c3c9d0", width: 1 }, layer: "below" }];
    const most = Math.max(...[...view.curves.values()].filter((s) => Math.floor(s.key / part.methods.length / part.ats) === stage).map((s) => s.n));
    return { data, layout: base(plain(stageText(stage)), `n = ${of(most, "recipe")}`, 380 + below(data).b, { shapes, margin: below(data), xaxis: axis("fraction of channels removed"), yaxis: { ...valueAxis(), ...fromZero(data) } }) };
  });
}

function drawSettings() {
  const { part } = view;
  if (!part.settings.length) return [{ reason: "The cells differ in no setting but the seed, so there is nothing to compare." }];
  const settings = independent(part, view.stages.flatMap((stage) => view.recipes(stage)));
  if (!settings.length) return [{ reason: "The recipes that are kept differ in no setting." }];
  return settings.map(({ s, along }) => {
    const setting = part.settings[s], data = [], levels = new Set();
    view.stages.forEach((stage, place) => {
      const groups = Map.groupBy(view.recipes(stage), (one) => part.cells.settings[s][one.cell]);
      const there = [...groups.keys()].sort((a, b) => a - b);
      there.forEach((level) => levels.add(level));
      for (const outcome of [...(place ? [] : ["base"]), "prune", "fold", "gap"]) { // uncompressed networks have no stage
        const all = there.map((level) => summary(groups.get(level).map((one) => one[outcome])));
        const low = outcome === "gap", shown = low ? (x) => x : value;
        data.push({
          name: WORD[outcome], legendgroup: outcome, showlegend: !place && !low, yaxis: low ? "y2" : "y", x: there.map((level) => [level, place]),
          y: all.map((one) => shown(one.mean)), error_y: bars(all, shown), mode: "lines+markers",
          text: all.map((one, i) => `${WORD[outcome]}, ${plain(part.stages[stage].name)}, ${label(setting.name)}=${label(setting.levels[there[i]])}<br>${low ? signed(one.mean) : number(one.mean)}${metric().log && !low ? "" : plusMinus(one.half)}, ${counted(one.n, "recipe")}`),
          hovertemplate: "%{text}<extra></extra>", line: { color: COLOR[outcome], width: 1, dash: place ? "dot" : "solid" },
          marker: { size: 8, color: place ? "#ffffff" : COLOR[outcome], line: { color: COLOR[outcome], width: 1.5 } },
        });
      }
    });
    if (!levels.size) return { reason: `No recipe that is kept has ${setting.name} at this stage and ratio.` };
    const order = [...levels].sort((a, b) => a - b), step = 0.14;
    for (const trace of data) trace.x = trace.x.map(([level, place]) => order.indexOf(level) + step * (place - (view.stages.length - 1) / 2));
    const every = Math.ceil(order.length / 12), ticks = order.map((_, i) => i).filter((i) => i % every === 0);
    return { data, layout: base(label(setting.name), `${ratioText()}${along.length ? `; with it change ${along.map((name) => label(name)).join(", ")}` : ""}`, 420, {
      xaxis: axis(label(setting.name), { tickvals: ticks, ticktext: ticks.map((i) => label(setting.levels[order[i]], 16)), range: [-0.5, order.length - 0.5], anchor: "y2" }),
      yaxis: { ...valueAxis(), domain: [0.4, 1] },
      yaxis2: axis(`gap, ${unit()}`, { domain: [0, 0.3], zeroline: true, zerolinecolor: "#9aa3ad" })
    }) };
  });
}

/** The comparisons that a forest plot shows: by the size of their effect at the first stage, the largest last (on top). */
function ranked() {
  const first = view.stages.length ? view.effects(view.stages[0]).filter((row) => row.outcome === "fold") : [];
  return first.sort((a, b) => Math.abs(a.mean) - Math.abs(b.mean)).slice(-ROWS).map(named);
}

const named = (row) => `${label(row.setting)} ${label(row.low, 16)} → ${label(row.high, 16)}${row.where ? ` if ${label(row.where, 24)}` : ""}`;
/** On a phone the name of a comparison stands in two lines. */
const lined = (name) => (innerWidth < 600 ? name.replace(" ", "<br>") : name);
const LANES = { fold: 0.22, base: 0, gap: -0.22 };
const CHANGED = { fold: "folded value", base: "uncompressed value", gap: "gap to pruning" };
const SYMBOL = { fold: "circle", base: "square", gap: "diamond" };

function drawEffects() {
  const names = ranked();
  if (!names.length) return [{ reason: "No two recipes that are kept differ in one setting only, so no effect can be told from the others." }];
  return view.stages.map((stage) => {
    const rows = view.effects(stage).filter((row) => names.includes(named(row)));
    if (!rows.length) return { reason: `No matched pairs at the stage ${view.part.stages[stage].name}.` };
    const legend = Object.keys(LANES).map((outcome) => ({ name: CHANGED[outcome], x: [null], y: [null], mode: "markers", marker: { symbol: SYMBOL[outcome], size: 8, color: COLOR[outcome] } }));
    const counts = new Map(rows.filter((row) => row.outcome === "fold").map((row) => [named(row), row.n]));
    const data = Object.keys(LANES).map((outcome) => {
      const own = rows.filter((row) => row.outcome === outcome);
      return {
        meta: outcome, showlegend: false,
        x: own.map((row) => row.mean), y: own.map((row) => names.indexOf(named(row)) + LANES[outcome]), error_x: { ...bars(own), color: COLOR[outcome] }, mode: "markers",
        customdata: own.map((row) => [row.setting, row.low, row.high, row.where, row.n, row.half, row.p_holm]),
        text: own.map((row) => `${named(row)}<br>${signed(row.mean)}${plusMinus(row.half)} ${unit()}, ${counted(row.n, "pair")}${row.p_holm === undefined ? "" : `, p ${row.p_holm < 0.001 ? "< .001" : row.p_holm.toFixed(3)} (Holm)`}`),
        hovertemplate: "%{text}<extra></extra>",
        marker: { symbol: SYMBOL[outcome], size: 8, line: { color: COLOR[outcome], width: 1.5 }, color: own.map((row) => (row.p_holm < 0.05 && row.n >= ENOUGH ? COLOR[outcome] : "#ffffff")) },
      };
    });
    const places = names.map((_, i) => i);
    return { data: [...data, ...legend], layout: base(plain(stageText(stage)), ratioText(), 150 + (innerWidth < 600 ? 62 : 44) * names.length, {
      margin: { l: 20, r: 14, t: 56, b: 84 },
      xaxis: axis(`change in ${unit()}; ${metric().higher_is_better ? "right is better" : "left is better, for the gap right"}`, { zeroline: true, zerolinecolor: "#5c6670" }),
      yaxis: axis("", { tickvals: places, ticktext: names.map((name) => `${lined(name)}<br>${of(counts.get(name) ?? 0, "pair")}`), range: [-0.6, names.length - 0.4] }),
    }) };
  });
}

function drawMap() {
  const { part } = view;
  if (part.settings.length < 2) return [{ reason: "The cells differ in fewer than two settings." }];
  const { x, y, outcome } = state.map;
  if (x === y) return [{ reason: "Choose two different settings." }];
  const [across, down] = [x, y].map((s) => [...new Set(view.stages.flatMap((stage) => view.recipes(stage).map((one) => part.cells.settings[s][one.cell])))].sort((a, b) => a - b));
  const grids = view.stages.map((stage) => {
    const groups = Map.groupBy(view.recipes(stage), (one) => `${part.cells.settings[x][one.cell]} ${part.cells.settings[y][one.cell]}`);
    return down.map((b) => across.map((a) => summary((groups.get(`${a} ${b}`) ?? []).map((one) => one[outcome]))));
  });
  const all = grids.flat(2).filter((one) => one.n).map((one) => one.mean);
  if (!all.length) return [{ reason: "No recipe that is kept has both settings at this stage and ratio." }];
  const limit = Math.max(...all.map(Math.abs));
  const scale = outcome === "gap" ? { colorscale: "RdBu", zmin: -limit, zmax: limit, reversescale: true } : { colorscale: "Cividis", zmin: Math.min(...all), zmax: Math.max(...all), reversescale: !metric().higher_is_better };
  const show = outcome === "gap" ? signed : number;
  return view.stages.map((stage, i) => ({
    data: [{
      type: "heatmap", ...scale, z: grids[i].map((row) => row.map((one) => (one.n ? one.mean : null))), x: across.map((_, k) => k), y: down.map((_, k) => k),
      text: grids[i].map((row) => row.map((one) => (one.n ? `${show(one.mean)}<br>n ${one.n}` : ""))), texttemplate: across.length * down.length > 80 ? "" : "%{text}",
      hovertext: grids[i].map((row, b) => row.map((one, a) => `${label(part.settings[x].name)}=${label(part.settings[x].levels[across[a]])}, ${label(part.settings[y].name)}=${label(part.settings[y].levels[down[b]])}<br>${one.n ? `${show(one.mean)}, ${of(one.n, "recipe")}` : "no recipe"}`)),
      hoverinfo: "text", xgap: 2, ygap: 2,
      colorbar: { title: { text: outcome === "gap" ? `gap, ${unit()}` : metric().log ? `100 ln ${plain(metric().title)}` : plain(metric().heading), side: "right" }, thickness: 12 },
    }],
    layout: base(`${WORD[outcome]}, ${plain(part.stages[stage].name)}`, ratioText(), Math.max(300, 130 + 46 * down.length), {
      margin: { l: 60, r: 14, t: 56, b: 60 },
      xaxis: axis(label(part.settings[x].name), { tickvals: across.map((_, k) => k), ticktext: across.map((a) => label(part.settings[x].levels[a], 16)), showgrid: false }),
      yaxis: axis(label(part.settings[y].name), { tickvals: down.map((_, k) => k), ticktext: down.map((b) => label(part.settings[y].levels[b], 16)), showgrid: false }),
    }),
  }));
}

/** Spread over the seeds of a recipe, pooled over recipes that have several: {sd, recipes, cells}. */
function spread(recipes, outcome) {
  let squares = 0, free = 0, cells = 0, several = 0;
  for (const one of recipes) {
    const found = summary(one.each[outcome]);
    if (found.n < 2) continue;
    squares += (found.n - 1) * found.sd ** 2;
    free += found.n - 1;
    cells += found.n;
    several++;
  }
  return { sd: Math.sqrt(squares / free), recipes: several, cells };
}

function drawNoise() {
  const { part } = view;
  const seeds = view.stages.map((stage) => {
    const data = ["fold", "gap", "base"].map((outcome) => {
      const all = part.ratios.map((_, r) => spread(view.recipes(stage, r), outcome));
      return { name: WORD[outcome], x: part.ratios, y: all.map((one) => one.sd), mode: "lines+markers", line: { color: COLOR[outcome] }, text: all.map((one) => `${of(one.recipes, "recipe")}, ${of(one.cells, "cell")}`), hovertemplate: "sd %{y:.2f}, %{text}<extra>%{fullData.name}</extra>" };
    });
    if (!data.some((trace) => trace.y.some((sd) => !Number.isNaN(sd)))) return { reason: `${stageText(stage)}: no recipe that is kept was run with two seeds, so the noise between seeds is not known. Run some recipes again with other seeds.` };
    const most = Math.max(...part.ratios.map((_, r) => spread(view.recipes(stage, r), "fold").recipes));
    return { data, layout: base(`spread over seeds, ${plain(part.stages[stage].name)}`, `n = ${of(most, "recipe")} with several seeds`, 360, { xaxis: axis("fraction of channels removed"), yaxis: axis(`standard deviation, ${unit()}`, { rangemode: "tozero" }) }) };
  });
  const pairs = view.stages.map((stage) => {
    const rows = view.effects(stage).filter((row) => row.outcome === "fold" && row.n >= SHOWN).sort((a, b) => a.sd - b.sd).slice(-ROWS).reverse();
    if (!rows.length) return { reason: `${stageText(stage)}: no setting has three matched pairs, so their spread is not known.` };
    const trace = (name, x, color, symbol) => ({ name, x, y: rows.map((_, i) => i), mode: "markers", marker: { color, symbol, size: 9 }, hovertemplate: "%{x} pairs<extra>%{fullData.name}</extra>" });
    return { data: [trace("pairs there are", rows.map((row) => row.n), COLOR.fold, "circle"), trace("pairs needed", rows.map((row) => needed(row.sd)), COLOR.prune, "diamond")], layout: base(`pairs for ± 1 ${unit() === "points" ? "point" : unit()}, ${plain(view.part.stages[stage].name)}`, ratioText(), 150 + (innerWidth < 600 ? 38 : 26) * rows.length, {
      margin: { l: 20, r: 14, t: 56, b: 84 }, xaxis: axis("matched pairs", { type: "log", dtick: 1, minor: { dtick: "D1" } }), yaxis: axis("", { tickvals: rows.map((_, i) => i), ticktext: rows.map((row) => lined(named(row))), range: [-0.6, rows.length - 0.4] }),
    }) };
  });
  return [...pairs, ...seeds];
}

/** Pearson's correlation of the pairs that have both. */
function correlation(x, y) {
  const there = x.map((_, i) => i).filter((i) => !Number.isNaN(x[i]) && !Number.isNaN(y[i]));
  const [a, b] = [x, y].map((all) => summary(there.map((i) => all[i])));
  return { n: there.length, r: there.reduce((total, i) => total + (x[i] - a.mean) * (y[i] - b.mean), 0) / ((there.length - 1) * a.sd * b.sd) };
}

/**
 * What an axis can show of a recipe: {title, of: recipe -> number, log: is the scale that of a metric on a log axis}. A
 * name is that of an outcome, "number 3" of an uncompressed network, or "left 0" of the best folding.
 */
function quantity(name) {
  const { part } = view, [kind, place] = name.split(" "), log = metric().log;
  if (kind === "number") return { title: `${part.numbers[place].name}, uncompressed`, of: (one) => summary(one.cells.map((c) => part.numbers[place].values[c])).mean };
  if (kind === "left") return { title: `${part.lines.left[place].name}, best folding`, of: (one) => summary(one.lines.map((i) => part.lines.left[place].values[i])).mean };
  if (kind === "gap") return { title: `gap, ${unit()}`, of: (one) => one.gap };
  const title = { base: "uncompressed", fold: "folded", prune: "pruned" }[kind];
  return { title: `${title}: ${metric().heading}`, of: (one) => value(one[kind]), log };
}

function quantities() {
  const { part } = view;
  return ["base", ...part.numbers.map((_, i) => `number ${i}`), "fold", "prune", "gap", ...part.lines.left.map((_, i) => `left ${i}`)];
}

function drawSize() {
  const { part } = view;
  const [x, y] = [state.axes.x, state.axes.y].map(quantity), same = state.axes.x === "base" && ["fold", "prune"].includes(state.axes.y);
  const of_axis = ({ title, log }) => axis(plain(title), log ? { type: "log", dtick: "D1" } : {});
  const scatter = view.stages.map((stage) => {
    const all = view.recipes(stage).map((one) => ({ one, x: x.of(one), y: y.of(one) })).filter((point) => Number.isFinite(point.x) && Number.isFinite(point.y));
    if (!all.length) return { reason: `${stageText(stage)}: no recipe that is kept has ${x.title} and ${y.title}.` };
    const scaled = (quantity, values) => (quantity.log ? values.map(Math.log) : values);
    const { n, r } = correlation(scaled(x, all.map((point) => point.x)), scaled(y, all.map((point) => point.y)));
    const values = all.flatMap((point) => [point.x, point.y]), ends = [Math.min(...values), Math.max(...values)];
    return { data: [
      ...(same ? [{ name: "nothing lost", x: ends, y: ends, mode: "lines", line: { color: COLOR.base, dash: "dot" }, hoverinfo: "skip" }] : []),
      { name: "a recipe", type: all.length > 2000 ? "scattergl" : "scatter", x: all.map((point) => point.x), y: all.map((point) => point.y), mode: "markers", marker: { color: COLOR[state.axes.y] ?? COLOR.fold, size: 7, opacity: 0.6 }, text: all.map(({ one }) => label(part.names[one.cell], 60)), hovertemplate: "%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>" },
    ], layout: base(plain(stageText(stage)), `${ratioText()}; correlation ${n < SHOWN ? "-, n too small" : Number.isNaN(r) ? "-" : r.toFixed(2)}, n = ${of(n, "recipe")}`, 380, { xaxis: of_axis(x), yaxis: of_axis(y) }) };
  });
  return [...scatter, ...view.stages.slice(0, 1).flatMap((stage) => [
    kindOfSize(stage, "parameters left, %", (one) => 100 * one.params),
    kindOfSize(stage, "multiply-accumulates left, %", (one) => 100 * one.macs),
    part.speeds ? kindOfSize(stage, `milliseconds (${plain(part.speeds.how)})`, milliseconds()) : { reason: "No network of these cells was timed: there is no speed.parquet beside their rows (profile= of the training command times them)." },
  ])];
}

function kindOfSize(stage, title, size) {
  const { part } = view;
  const data = part.methods.map((name, m) => {
    const all = part.ratios.map((_, r) => view.curves.get((stage * part.ats + r) * part.methods.length + m)).filter((one) => one && Number.isFinite(size(one)));
    return { name: plain(name), meta: all.map((one) => one.n), x: all.map(size), y: all.map((one) => value(one.mean)), mode: "lines+markers", marker: { color: style(name).color, size: 6 }, line: { color: style(name).color, dash: style(name).dash }, text: all.map((one) => `${plain(name)}: ${number(one.mean)}, ${of(one.n, "recipe")}`), hovertemplate: "%{x:.3g}, %{text}<extra></extra>" };
  }).filter((trace) => trace.x.length);
  if (!data.length) return { reason: `No measurement that is kept says ${title}.` };
  return { data, layout: base(plain(stageText(stage)), `n = ${of(Math.max(...data.flatMap((trace) => trace.meta)), "recipe")}`, 320 + below(data).b, { margin: below(data), xaxis: axis(title, { rangemode: "tozero" }), yaxis: valueAxis() }) };
}

/** Mean time of each method and ratio over the cells that are kept and were timed. */
function milliseconds() {
  const { part, keep } = view, { cell, method, ratio, ms } = part.speeds, groups = new Map();
  cell.forEach((c, i) => {
    const key = ratio[i] * part.methods.length + method[i];
    if (keep[c]) groups.set(key, [...(groups.get(key) ?? []), ms[i]]);
  });
  return (one) => summary(groups.get(one.key % (part.ats * part.methods.length)) ?? []).mean;
}

// The models of a prediction, as the picture and the table call them.
const MODEL = { ridge: "ridge", forest: "forest", mean: "", "always fold": "" };

function drawPrediction() {
  const { part } = view, told = part.prediction;
  if (told.reason) return [{ reason: told.reason }];
  const line = told.lines[told.drawn], there = [...told.cell.keys()].filter((i) => view.keep[told.cell[i]]);
  if (!there.length) return [{ reason: "No network that is kept was foretold." }];
  const x = there.map((i) => value(told.said[i])), y = there.map((i) => value(told.fold[i])), every = [...x, ...y];
  const ends = [Math.min(...every), Math.max(...every)], stage = part.stages.find((one) => one.name === told.stage);
  return [{ data: [
    { name: "as foretold", x: ends, y: ends, mode: "lines", line: { color: COLOR.base, dash: "dot" }, hoverinfo: "skip" },
    { name: "a network", type: there.length > 2000 ? "scattergl" : "scatter", x, y, mode: "markers", marker: { color: COLOR.fold, size: 7, opacity: 0.6 }, text: there.map((i) => label(part.names[told.cell[i]], 60)), hovertemplate: "%{text}<br>foretold %{x:.4g}, measured %{y:.4g}<extra></extra>" },
  ], layout: base(plain(stage.title), `ratio ${told.ratio}; ${MODEL[line.model]} on ${line.from}; n = ${of(there.length, "network")}`, 400, { xaxis: valueAxis(`foretold: ${plain(metric().heading)}`), yaxis: valueAxis(`folded: ${plain(metric().heading)}`) }) }];
}

/** The scores of all models, which no filter changes. */
function predictionTable() {
  const { part } = view, told = part.prediction, box = $("#prediction .said");
  if (part.empty || told.reason) return box.replaceChildren();
  const digits = { r2: 2, mae: Math.max(1, metric().digits) };
  const score = (line, name) => (line[name] === null ? "-" : `${line[name].toFixed(digits[name])} (${line[`${name}_low`]?.toFixed(digits[name]) ?? "-"} to ${line[`${name}_high`]?.toFixed(digits[name]) ?? "-"})`);
  const key = ({ features, model }) => `${features} ${model}`, rows = new Map();
  for (const line of told.lines) rows.set(key(line), { ...rows.get(key(line)), line, [line.target]: line });
  const texts = [...rows.values()].map(({ line, fold, gap }) => [
    line.model === "always fold" ? "always fold" : `${line.from}${MODEL[line.model] ? `, ${MODEL[line.model]}` : ""}`,
    ...[fold, gap].flatMap((one) => (one ? [score(one, "r2"), score(one, "mae")] : ["-", "-"])), gap?.regret?.toFixed(2) ?? "-",
  ]);
  const heads = ["foretold from", "R² of the folded value", `error, ${unit()}`, "R² of the gap", `error, ${unit()}`, `regret, ${unit()}`];
  const { n, recipes } = told.lines[0], ceiling = Object.fromEntries(["fold", "gap"].map((target) => [target, told.lines.find((line) => line.target === target).ceiling]));
  const known = ceiling.fold === null ? "No recipe has two seeds, so the ceiling that noise sets to settings is not known." : `The noise between seeds lets settings reach an R² of ${ceiling.fold.toFixed(2)} for the folded value${ceiling.gap === null ? "" : ` and ${ceiling.gap.toFixed(2)} for the gap`}; numbers on the network may pass it.`;
  const data = told.data.length ? ` Among the numbers on the network ${told.data.join(", ")} need data.` : "";
  box.replaceChildren(
    element("p", { className: "note" }, `${of(n, "network")} of ${of(recipes, "recipe")}, ${told.stage}, ratio ${told.ratio}. ${known}${data}`),
    element("div", { className: "table" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)))), element("tbody", {}, ...texts.map((row) => element("tr", {}, ...row.map((text) => element("td", {}, text))))))),
  );
}

function drawParallel() {
  const { part } = view;
  const all = view.stages.length ? view.recipes(view.stages[0]).filter((one) => !Number.isNaN(one.fold)) : [];
  if (!all.length) return [{ reason: "No recipe that is kept has a folded value at this stage and ratio." }];
  const settings = independent(part, all).map(({ s }) => {
    const setting = part.settings[s], codes = all.map((one) => part.cells.settings[s][one.cell]), every = Math.ceil(setting.levels.length / 12);
    const ticks = setting.levels.map((_, i) => i).filter((i) => i % every === 0);
    return { label: label(setting.name, 14), values: codes, range: [0, Math.max(1, setting.levels.length - 1)], tickvals: ticks, ticktext: ticks.map((i) => label(setting.levels[i], 14)) };
  });
  const outcomes = ["base", "prune", "gap", "fold"].filter((outcome) => all.some((one) => !Number.isNaN(one[outcome])));
  const values = outcomes.map((outcome) => ({ label: WORD[outcome], values: all.map((one) => (outcome === "gap" ? one.gap : value(one[outcome]))) }));
  return [{
    data: [{ type: "parcoords", dimensions: [...settings, ...values], labelangle: -20, labelside: "top", line: { color: all.map((one) => one.fold), colorscale: "Cividis", reversescale: !metric().higher_is_better } }],
    layout: base(plain(stageText(view.stages[0])), `${ratioText()}; n = ${of(all.length, "recipe")}`, 440, { margin: { l: 90, r: 60, t: 130, b: 24 }, width: Math.max($("#parallel").clientWidth, 85 * (settings.length + values.length)), autosize: false }),
    after: (div) => { div.on("plotly_restyle", () => brush(div, all)); },
  }];
}

/** Keep the recipes inside of the ranges that were dragged. */
function brush(div, all) {
  const limits = div.data[0].dimensions.map((one) => (one.constraintrange ? (Array.isArray(one.constraintrange[0]) ? one.constraintrange : [one.constraintrange]) : null));
  const inside = (i) => limits.every((ranges, d) => !ranges || ranges.some(([low, high]) => div.data[0].dimensions[d].values[i] >= low && div.data[0].dimensions[d].values[i] <= high));
  state.brushed = limits.some(Boolean) ? new Set(all.filter((_, i) => inside(i)).map((one) => one.recipe)) : null;
  table();
}

// ---- Page: what is drawn when, filters, table

const SECTIONS = { curves: drawCurves, settings: drawSettings, effects: drawEffects, map: drawMap, noise: drawNoise, prediction: drawPrediction, size: drawSize, parallel: drawParallel };
const dirty = new Set(), near = new Set();
const $ = (selector) => document.querySelector(selector);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(section) {
  dirty.delete(section);
  const box = $(`#${section} .plots`);
  const figures = view.part.empty ? [{ reason: view.part.empty }] : view.stages.length ? SECTIONS[section]() : [{ reason: "Choose a stage." }];
  while (box.children.length > figures.length) {
    Plotly.purge(box.lastChild);
    box.lastChild.remove();
  }
  while (box.children.length < figures.length) box.append(element("div")); // all before the first, which takes its width from them
  figures.forEach((figure, i) => {
    const div = box.children[i];
    if (figure.reason || div.className === "none" || figure.after) {
      Plotly.purge(div);
      div.replaceChildren();
    }
    div.className = figure.reason ? "none" : "";
    if (figure.reason) return div.append(figure.reason);
    div.setAttribute("role", "figure");
    div.setAttribute("aria-label", figure.layout.title.text);
    Plotly.react(div, figure.data, figure.layout, CONFIG);
    figure.after?.(div);
  });
}

/** Pictures far away wait until they are scrolled to: all at once would make the page three times slower to open. */
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) near.delete(target.id);
    else if (near.add(target.id) && dirty.has(target.id)) draw(target.id);
  }
}, { rootMargin: "150px" });

function redraw() {
  view = viewed();
  state.brushed = null;
  state.rows = ROWS;
  said();
  Object.keys(SECTIONS).forEach((section) => dirty.add(section));
  [...near].filter((section) => dirty.has(section)).forEach(draw);
  table();
}

/** The lines of text that depend on the filters: what is shown, and the headline in numbers. */
function said() {
  const { part } = view;
  if (part.empty) return $("#shown").replaceChildren(part.empty);
  const out = part.settings.flatMap((setting, s) => state.out[s].size ? [`${setting.name} = ${setting.levels.filter((_, i) => !state.out[s].has(i)).map((level) => cut(level)).join(" or ") || "nothing"}`] : []);
  const recipes = new Set(part.cells.recipe.filter((_, cell) => view.keep[cell])).size;
  $("#shown").replaceChildren(`Shown: ${part.title}; ${view.stages.map((stage) => part.stages[stage].name).join(" and ") || "no stage"}; ${ratioText()}; ${of(recipes, "recipe")}, ${of(view.cells, "cell")}${out.length ? `; ${out.join("; ")}` : ""}.`);
  $("#lead").replaceChildren(...view.stages.flatMap((stage) => {
    const [fold, prune, gap] = ["fold", "prune", "gap"].map((name) => summary(view.recipes(stage).map((one) => one[name])));
    if (!fold.n && !prune.n) return [];
    const shown = (one) => `${number(one.mean)}${metric().log ? "" : plusMinus(one.half)}`;
    return [`${part.stages[stage].name}, ${ratioText()}: best folding ${shown(fold)}, best pruning ${shown(prune)}${gap.n ? `, gap ${signed(gap.mean)}${plusMinus(gap.half)} ${unit()}` : ""}; mean of ${counted(fold.n || prune.n, "recipe")}.`, element("br")];
  }));
}

function fixed() {
  const { part } = view;
  const list = (sentences) => (sentences ?? []).map((sentence) => element("li", {}, sentence));
  $("#answer ol").replaceChildren(...list(part.sentences));
  $("#noise .said").replaceChildren(element("ul", {}, ...list(part.noise)));
  predictionTable();
}

function choice(name, title, options, chosen, change) {
  const select = element("select", { name, id: `choose-${name}` }, ...options.map((text, i) => element("option", { value: i, selected: i === chosen }, text)));
  select.addEventListener("change", () => change(Number(select.value)));
  return element("fieldset", {}, element("legend", {}, element("label", { htmlFor: select.id }, title)), select);
}

function boxes(name, title, options, isOn, change) {
  const list = options.map((text, i) => {
    const input = element("input", { type: "checkbox", name, value: i, checked: isOn(i) });
    input.addEventListener("change", () => { change(i, input.checked); redraw(); });
    return element("label", { title: text }, input, cut(text, 60));
  });
  return element("fieldset", {}, element("legend", {}, title), element("div", { className: "levels" }, ...list));
}

const flip = (set, i, on) => (on ? set.add(i) : set.delete(i));

function form() {
  const { part } = view, fields = [];
  if (DATA.parts.length > 1) fields.push(choice("part", "model and data", DATA.parts.map((one) => one.title), state.part, begin));
  if (!part.empty) {
    fields.push(boxes("stage", "stage", part.stages.map((one) => one.title), (i) => state.stages.has(i), (i, on) => flip(state.stages, i, on)));
    const ratios = [...part.ratios.map((ratio) => `${ratio} of the channels removed`), "area under the curve"];
    fields.push(choice("ratio", "ratio", ratios, state.ratio, (i) => { state.ratio = i; redraw(); }));
    part.settings.forEach((setting, s) => fields.push(boxes(`setting-${s}`, setting.name, setting.levels, (i) => !state.out[s].has(i), (i, on) => flip(state.out[s], i, !on))));
    const reset = element("button", { type: "button" }, "Reset filters");
    reset.addEventListener("click", () => begin(state.part));
    fields.push(element("fieldset", {}, reset));
  }
  $("#form").replaceChildren(...fields);
}

/** A choice above the pictures of a section: sets `of[key]` to one of the values, and draws the section anew. */
function control(section, of, title, key, options, values) {
  const select = element("select", { name: `${section}-${key}` }, ...options.map((text, i) => element("option", { value: i, selected: values[i] === of[key] }, text)));
  select.addEventListener("change", () => { of[key] = values[select.value]; draw(section); });
  return element("label", { className: "inline" }, `${title} `, select);
}

function mapControls() {
  const { part } = view;
  if (part.empty || part.settings.length < 2) return $("#map .controls").replaceChildren();
  const names = part.settings.map((setting) => setting.name), outcomes = ["fold", "gap", "prune", "base"], places = names.map((_, i) => i);
  const pick = (...choice) => control("map", state.map, ...choice);
  $("#map .controls").replaceChildren(pick("across", "x", names, places), pick("down", "y", names, places), pick("value", "outcome", outcomes.map((outcome) => WORD[outcome]), outcomes));
}

function sizeControls() {
  if (view.part.empty) return $("#size .controls").replaceChildren();
  const names = quantities(), titles = names.map((name) => quantity(name).title);
  $("#size .controls").replaceChildren(...[["across", "x"], ["up", "y"]].map(([title, key]) => control("size", state.axes, title, key, titles, names)));
}

/** The two settings whose effects are largest, else the first two. */
function strongest() {
  const names = [...new Set(ranked().length ? view.effects(view.stages[0]).filter((row) => row.outcome === "fold").sort((a, b) => Math.abs(b.mean) - Math.abs(a.mean)).map((row) => row.setting) : [])];
  const order = [...names, ...view.part.settings.map((setting) => setting.name)];
  const [x, y] = [...new Set(order)].slice(0, 2).map((name) => view.part.settings.findIndex((setting) => setting.name === name));
  return { x, y, outcome: "fold" };
}

/** Columns of the table: a title, the key to sort a cell by, and its text or link. */
function columns() {
  const { part } = view, outcome = (name, show) => ({ title: WORD[name], key: (one, i) => one.each[name][i], text: show });
  const cell = { title: "cell", key: (one, i) => part.names[one.cells[i]], text: (name, c) => link(part.folders[c], name) };
  const settings = part.settings.map(({ name, levels }, s) => ({ title: name, key: (one) => part.cells.settings[s][one.cell], text: (code) => cut(levels[code], 30) }));
  const run = { title: "W&B", key: (one, i) => part.wandb[one.cells[i]], text: (address) => link(address, address ? "run" : "-") };
  return [cell, outcome("fold", number), outcome("prune", number), outcome("gap", signed), outcome("base", number), { title: "seeds", key: (one) => one.cells.length, text: String }, ...settings, ...(part.wandb.some(Boolean) ? [run] : [])];
}

const link = (href, text) => (href ? element("a", { href }, text) : text);

function table() {
  const { part } = view, box = $("#table .table");
  if (part.empty || !view.stages.length) return box.replaceChildren(element("p", { className: "none" }, part.empty ?? "Choose a stage."));
  const [stage] = view.stages, shown = columns();
  state.sort ??= { place: 1, down: metric().higher_is_better };
  const { place, down } = state.sort, order = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  const lines = view.recipes(stage).filter((one) => !state.brushed || state.brushed.has(one.recipe)).flatMap((one) => one.cells.map((cell, i) => ({ cell, keys: shown.map(({ key }) => key(one, i)) })));
  const unknown = ({ keys }) => Number.isNaN(keys[place]); // unknown values come last, whichever way it goes
  lines.sort((a, b) => unknown(a) - unknown(b) || (down ? -1 : 1) * order(a.keys[place], b.keys[place]));
  const rows = lines.slice(0, state.rows).map(({ cell, keys }) => element("tr", {}, ...keys.map((key, i) => element("td", {}, shown[i].text(key, cell)))));
  const more = element("button", { type: "button" }, `Show ${Math.min(200, lines.length - rows.length)} more`);
  more.addEventListener("click", () => { state.rows += 200; table(); });
  box.replaceChildren(
    element("p", { className: "note" }, `${of(lines.length, "cell")} at ${part.stages[stage].name}, ${ratioText()}${state.brushed ? ", inside of the ranges that were dragged above" : ""}. Values: ${metric().heading}, ${better()}; gap: ${unit()}.`),
    element("table", {}, element("thead", {}, element("tr", {}, ...shown.map(({ title }, i) => heading(title, i)))), element("tbody", {}, ...rows)),
    ...(lines.length > rows.length ? [more] : []),
  );
}

function heading(text, place) {
  const button = element("button", { type: "button" }, cut(text)), cell = element("th", { scope: "col" }, button);
  if (state.sort.place === place) cell.setAttribute("aria-sort", state.sort.down ? "descending" : "ascending");
  button.addEventListener("click", () => {
    state.sort = { place, down: state.sort.place === place ? !state.sort.down : true };
    table();
    $(`#table th:nth-child(${place + 1}) button`).focus();
  });
  return cell;
}

/** Show a family of cells with nothing filtered. */
function begin(place) {
  state.part = place;
  const part = unpacked(DATA.parts[place]);
  if (!part.empty) {
    state.stages = new Set(part.stages.slice(0, 2).map((_, i) => i));
    state.ratio = part.lead[1];
    state.out = part.settings.map(() => new Set());
  }
  state.sort = null;
  state.axes = { x: "base", y: "fold" };
  view = viewed();
  if (!part.empty && part.settings.length > 1) state.map = strongest();
  form();
  mapControls();
  sizeControls();
  fixed();
  redraw();
}

/** Nothing on paper can be scrolled to. */
addEventListener("beforeprint", () => [...dirty].forEach(draw));

/** Unpack plotly and the data, then show the page. */
async function start() {
  const [plotly, data] = await Promise.all(["plotly", "data"].map(inflated));
  document.head.append(element("script", { textContent: plotly })); // runs at once
  DATA = JSON.parse(data);
  ({ enough: ENOUGH, shown: SHOWN } = DATA);
  if (matchMedia("(max-width: 900px)").matches) $("#filters").open = false;
  if (!DATA.parts.length) { // the cells ran chains alone, whose section needs no script
    document.querySelectorAll("aside, main > :not(#chains)").forEach((one) => one.remove());
    $("#page").style.display = "block"; // no column for the filters
    return;
  }
  begin(0);
  Object.keys(SECTIONS).forEach((section) => observer.observe(document.getElementById(section)));
}

start();
