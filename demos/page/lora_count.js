// The LoRA tab's numbers and words: functions of what the server sent, `data`, and of what is set, `settings`. The backend
// counts and says them alike: WORDS has its texts, and words.js, which stands before this, its formats.

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const valueOf = (terms, sizes) => Math.round(sum(terms.map(([c, names]) => names.reduce((n, name) => n * sizes[name], c))));
/** In how many layers each kind of module is adapted. A module outside the layers is adapted where all layers are. */
const chosenOf = (data, {method, targets, layers}) =>
  data.modules.map((m) => !targets.has(m.name) || (m.experts && data.methods[method].experts === null) ? 0
    : m.layers.length ? m.layers.filter((layer) => layers.has(layer)).length : +(layers.size === data.n_layers));
const trainsNothing = (data, settings) => !chosenOf(data, settings).some(Boolean);

/** Parameters: `each` of one module of a kind, `rows` of a kind in its `chosen` layers, all that are `trained` or `saved`. */
const count = (data, settings) => {
  const method = data.methods[settings.method], chosen = chosenOf(data, settings);
  const each = data.modules.map((m) => valueOf(method.terms, {...m, rank: settings.rank}));
  const kept = data.modules.map((m) => valueOf(method.saved, {...m, rank: settings.rank}));
  const total = (one) => sum(one.map((n, i) => n * chosen[i]));
  return {each, chosen, rows: each.map((n, i) => n * chosen[i]), trained: total(each), saved: total(kept)};
};

/** The alpha of the run: as it is set, or by the method's rule; null where the method has none. */
const alphaOf = (data, {method, rank, alpha}) => {
  const rule = data.methods[method].alpha;
  return rule === null ? null : alpha ?? rule[0] + rule[1] * rank;
};
const scaleOf = (data, settings) => {
  const alpha = alphaOf(data, settings);
  return alpha === null ? 1 : alpha / (data.methods[settings.method].root ? Math.sqrt(settings.rank) : settings.rank);
};

/** A set of layers as the setting `layers` says it; empty for all. */
const layersText = (layers, n) => {
  if (layers.size === n) return '';
  const runs = [];
  for (const layer of [...layers].sort((a, b) => a - b)) {
    const run = runs[runs.length - 1];
    if (run && layer === run[1] + 1) run[1] = layer; else runs.push([layer, layer]);
  }
  return runs.map(([a, b]) => a === b ? `${a}` : `${a}-${b}`).join(',');
};
const targetsText = (data, targets) => {
  const names = data.modules.filter((m) => targets.has(m.name)).map((m) => m.name);
  return data.modules.every((m) => targets.has(m.name) !== (m.role === 'head')) ? 'all-linear' : names.join(',');
};
/** What is wrong with the settings, with `typed` numbers in place of theirs; empty when nothing is. */
const refusal = (data, settings, typed = {}) => {
  const number = (name) => typed[name] === undefined ? settings[name] : typed[name] === '' ? NaN : +typed[name];
  const given = (name) => typed[name] || (Number.isNaN(number(name)) ? 'nothing' : number(name));
  const method = data.methods[settings.method], {targets, layers} = settings, rank = number('rank'), alpha = number('alpha');
  if (!targets.size) return WORDS.no_target;
  if (!layers.size) return WORDS.no_layer;
  if (!Number.isInteger(rank) || rank < 1) return fill(WORDS.bad_rank, {rank: given('rank')});
  if (alpha !== null && !(alpha > 0 && alpha <= 1e6)) return fill(WORDS.bad_alpha, {alpha: given('alpha')});
  if (trainsNothing(data, settings)) return WORDS.no_layer;
  if (method.experts && data.modules.some((m) => m.experts && targets.has(m.name))) return method.experts;
  if (!method.limit) return rank <= 65536 ? '' : fill(WORDS.bad_rank, {rank});
  const chosen = chosenOf(data, settings), ranks = data.modules.filter((_, i) => chosen[i]).map((m) => m.full_rank);
  const limit = method.limit === 'largest' ? Math.max(...ranks) : Math.min(...ranks);
  if (rank <= limit) return '';
  return fill(WORDS.rank, {rank, limit, which: WORDS[method.limit], usual: Math.min(limit, WORDS.usual_rank)});
};
const sentence = (data, {method, rank, targets, layers, bytes}, counted) => {
  const text = targetsText(data, targets), which = layersText(layers, data.n_layers);
  return fill(WORDS.sentence, {
    what: method === 'lora' ? `Rank ${rank}` : `${data.methods[method].name}, rank ${rank},`,
    where: (WORDS.where[text] ?? text.replaceAll(',', ', ')) + (which && ` of layers ${which}`),
    trained: bold(whole(counted.trained), 'trained'),
    total: bold(whole(data.total), 'frozen'),
    percent: bold(percent(counted.trained / data.total), 'trained'),
    size: size(counted.saved * bytes),
  });
};
/** The setting that a refusal begins with, where that setting has a place for its refusals; empty otherwise. */
const blamed = (wrong) => /^(rank|alpha)=/.exec(wrong)?.[1] ?? '';
