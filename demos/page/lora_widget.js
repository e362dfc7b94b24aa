// The LoRA tab, drawn by the page alone. The server sends a model's shapes and the registry's terms; every slider, tick and
// click after that is answered here, and written to the page's settings, which ask the server once the reader pauses.

// --- the state: what the server sent, and what the reader has done since

const stage = element.closest('.stage');
let data, settings, typed = {}, shown, built, late = 0, places = {}, width = 600; // typed: numbers that are refused

const $ = (name) => places[name] ??= stage.querySelector(`.main ${name}`);
const all = (name) => places[name + ' all'] ??= [...stage.querySelectorAll(name)];
/** Writes what is not there already. Where only words between the tags differ, only these: parsing and laying out the
 * rest again took a third of a slow frame. */
const put = (place, html) => {
  if (place.written === html) return;
  const parts = html.split(/(<[^>]*>)/), texts = parts.filter((part, i) => part && i % 2 === 0);
  const tags = parts.map((part, i) => i % 2 ? part : part && ' ').join('');
  if (place.tags !== tags || html.includes('&')) {
    place.innerHTML = html;
    place.texts = textsOf(place);
  } else texts.forEach((text, i) => { if (place.texts[i].data !== text) place.texts[i].data = text; });
  Object.assign(place, {written: html, tags});
};
const textsOf = (node) => [...node.childNodes].flatMap((child) => child.data === undefined ? textsOf(child) : [child]);
const style = (place, name, value) => { if (place.style.getPropertyValue(name) !== value) place.style.setProperty(name, value); };
const enter = (input, value) => { if (input.value !== String(value)) input.value = value; };
const attribute = (place, name, value) => { if (place.getAttribute(name) !== String(value)) place.setAttribute(name, value); };
const knob = (name, kind) => stage.querySelector(`[data-knob="${name}"]${kind ? `[type=${kind}]` : ''}`);
/** Numbers that a slider stops at: every one to 16, then eight to the octave, up to the largest. */
const stops = (top) => {
  const numbers = [];
  for (let n = 1; n < top; n += 2 ** Math.max(0, Math.floor(Math.log2(n)) - 3)) numbers.push(n);
  return [...numbers, top];
};
const nearest = (numbers, one) => Math.min(numbers.filter((n) => n < one).length, numbers.length - 1);
const evenOf = (m) => m.d_in * m.d_out / (m.d_in + m.d_out);

/** All linear modules, and all layers. */
const everything = () => ({
  targets: new Set(data.modules.filter((m) => m.role !== 'head').map((m) => m.name)),
  layers: new Set(Array.from({length: data.n_layers}, (_, i) => i)),
});
/** The settings as the server has them, but for a slider that the reader holds. */
const read = () => {
  const held = stage.querySelector('[type=range][data-knob]:active')?.dataset.knob, mine = settings?.[held];
  data = {...props.value};
  const {method, rank, alpha, targets, layers, refused} = data.at;
  settings = {method, rank, bytes: data.bytes, alpha: alpha ?? null, targets: new Set(targets), layers: new Set(layers)};
  if (held) settings[held] = mine;
  typed = {...refused};
  const largest = Math.max(...data.modules.map((m) => Math.min(m.d_in, m.d_out)));
  data.stops = {rank: stops(largest), alpha: stops(Math.max(2 * largest, data.at.alpha ?? 0))};
  shown = data.modules.find((m) => m.name === shown?.name) ?? data.modules.find((m) => targets.includes(m.name)) ?? data.modules[0];
};

/** Writes what is set here, a refused number as it was typed. A method is written where it is another one: it clears others. */
const report = () => {
  stage.querySelectorAll('.knob .refusal').forEach((old) => old.remove());
  if (trainsNothing(data, settings)) return;
  const layers = layersText(settings.layers, data.n_layers), asSent = layers === layersText(new Set(data.at.layers), data.n_layers);
  props.value = {...props.value, moved: true}; // or an answer that takes the move back would be no change, which Gradio tells nobody of
  const targets = targetsText(data, settings.targets), isUsual = settings.rank === data.methods[settings.method].usual;
  peftlab.heard('lora.picture', null, true, {
    ...(settings.method === (peftlab.get().state.method ?? OPENING.method) ? {} : {method: settings.method}),
    rank: isUsual ? null : settings.rank, alpha: settings.alpha,
    ...Object.fromEntries(Object.entries(typed).filter(([, text]) => text)),
    target_modules: targets === 'all-linear' ? null : targets, layers: asSent ? data.at.layers_said : layers || null,
  });
};
/** Who leaves before that rests is not kept waiting: what they open next is to show the new settings. */
const left = () => { if (peftlab.get().resting) peftlab.write({}); };
const released = () => {
  paint();
  report();
};

// --- the picture

const box = (name, meaning) => `<figure class="matrix ${meaning}"><div></div><figcaption><b>${name}</b> <span></span></figcaption></figure>`;
const build = () => {
  places = {};
  $('.matrices').innerHTML = `${box('W', 'frozen')}<span class="sign">+</span><div class="update">${box('ΔW', 'trained delta')}` +
    `<span class="sign">=</span><span class="sign times"></span>${box('B', 'trained')}<span class="sign">×</span>${box('A', 'trained')}</div>`;
  const rows = [...data.modules.map((m) => [m.name, m.parameters * (m.layers.length || 1), m]), ...data.rest.map((r) => [r.name, r.parameters, null])];
  stage.classList.toggle('long-names', data.modules.some((m) => m.label.includes('.')));
  const unit = 230 / sum(rows.map(([, n]) => n));
  $('.map').innerHTML = rows.map(([name, n, m]) => {
    const height = Math.max(1, n * unit).toFixed(1);
    const strip = `<div class="strip" style="height:${height}px"><i></i></div>`;
    return m
      ? `<div class="map-row" data-module="${name}"><label title="${m.path}"><input type="checkbox" data-knob="target" value="${name}"><span>${m.label}</span></label>${strip}<output></output></div>`
      : `<div class="map-row rest"><span class="map-name">${name}</span>${strip}<span class="map-count">${whole(n)} frozen</span></div>`;
  }).join('');
  $('.layers').innerHTML = Array.from({length: data.n_layers}, (_, i) =>
    `<button type="button" data-layer="${i}" tabindex="${i ? -1 : 0}" aria-label="layer ${i}"></button>`).join('');
  toy();
};

const paint = () => {
  const wrong = refusal(data, settings, typed);
  for (const of of ['', 'rank', 'alpha']) put(stage.querySelector(`.here[data-of="${of}"]`), blamed(wrong) === of ? wrong : '');
  sync();
  if (refusal(data, settings)) return;
  put($('.sentence'), sentence(data, settings, count(data, settings)));
  paintMatrices();
  if (!late) late = requestAnimationFrame(() => { late = requestAnimationFrame(paintRest); });
};

/** What a move changes besides, a frame after it: as they were when the frame comes. */
const paintRest = () => {
  late = 0;
  if (refusal(data, settings)) return;
  const counted = count(data, settings);
  paintFindings(counted);
  paintAxis();
  paintMap(counted);
  paintTotals(counted);
};

/** The controls beside the picture show what the settings are. */
const sync = () => {
  const {method, rank, alpha, targets} = settings, auto = alphaOf(data, {...settings, alpha: null});
  for (const [name, value] of [['rank', rank], ['alpha', alpha ?? auto]]) {
    const range = knob(name, 'range'), number = knob(name, 'number'), numbers = data.stops[name];
    attribute(range, 'max', numbers.length - 1);
    if (numbers[range.value] !== value) enter(range, nearest(numbers, value));
    attribute(range, 'aria-valuetext', `${name} ${value}`);
    const said = Number.isNaN(+(typed[name] ?? value)) ? '' : typed[name] ?? value;
    if (document.activeElement !== number || number.value !== '' && +number.value !== +said) enter(number, said); // not while one types
  }
  enter(knob('method'), method);
  stage.querySelector('.alpha-knob').hidden = auto === null;
  knob('automatic').disabled = alpha === null;
  const preset = presetNow();
  enter(knob('preset'), preset);
  put(knob('preset').previousElementSibling, PRESETS[preset]?.says ?? PUBLISHED);
  all('[data-knob=target]').forEach((tick) => { tick.checked = targets.has(tick.value); });
};

const paintMatrices = () => {
  const m = shown, unit = Math.max(m.d_in, m.d_out), {rank} = settings;
  const sizes = [[m.d_out, m.d_in], [m.d_out, m.d_in], [m.d_out, rank], [rank, m.d_in]];
  all('.matrices .matrix').forEach((figure, i) => {
    const [high, wide] = sizes[i], drawn = figure.firstChild;
    style(drawn, '--h', (high / unit).toFixed(5));
    style(drawn, '--w', (wide / unit).toFixed(5));
    put(figure.lastChild.lastChild, `${whole(high)} × ${whole(wide)}<small>` + [
      `${whole(high * wide)} frozen`, 'as large as W', `${whole(high * wide)} trained`, `${whole(high * wide)} trained`][i] + '</small>');
  });
  put($('.times'), `${significant(scaleOf(data, settings))} ×`);
  attribute($('.matrices'), 'aria-label', fill(WORDS.spoken, {d_out: m.d_out, d_in: m.d_in, rank}));
};

const paintFindings = ({each}) => {
  const m = shown, {rank} = settings, scale = scaleOf(data, settings);
  for (const name of ['.delta', '.toy']) style($(name), '--breath', (scale / (scale + 1)).toFixed(3));
  const even = evenOf(m), one = each[data.modules.indexOf(m)], base = m.d_in * m.d_out;
  const past = fill(WORDS[rank >= even ? 'past' : 'before'], {rank, even: Math.round(even), times: significant(even / rank)});
  put($('.finding'), fill(WORDS.matrix, {name: m.path, one: whole(one), base: whole(base), share: percent(one / base)}) +
    ' ' + past + (m.swapped ? ' ' + WORDS.swapped : ''));
  const alpha = alphaOf(data, settings);
  put($('.scale'), alpha === null ? WORDS.no_alpha : fill(WORDS.scale, {
    alpha: significant(alpha), rank, plain: bold(significant(alpha / rank), data.methods[settings.method].root ? '' : 'trained'),
    root: bold(significant(alpha / Math.sqrt(rank)), data.methods[settings.method].root ? 'trained' : ''),
  }));
  toyFinding();
};

const paintAxis = () => {
  const m = shown, even = evenOf(m), {rank} = settings, end = Math.max(1.25 * even, 1.15 * rank);
  const high = 190, left = 4, right = 12, top = 26, foot = 34;
  const x = (r) => left + (width - left - right) * r / end, most = Math.max(m.d_in * m.d_out, rank * (m.d_in + m.d_out)) * 1.08;
  const y = (n) => high - foot - (high - foot - top) * n / most;
  put($('.rank-axis'), `<svg viewBox="0 0 ${width} ${high}" width="${width}" height="${high}" role="img" aria-label="${fill(WORDS.axis, {even: Math.round(even)})}">` +
    `<rect class="past" x="${x(even)}" y="${top}" width="${x(end) - x(even)}" height="${high - foot - top}"/>` +
    `<path class="frozen" d="M${x(0)} ${y(m.d_in * m.d_out)}H${x(end)}"/><path class="trained" d="M${x(0)} ${y(0)}L${x(end)} ${y(end * (m.d_in + m.d_out))}"/>` +
    `<path class="even" d="M${x(even)} ${top}V${high - foot}"/><path class="base" d="M${x(0)} ${high - foot}H${x(end)}"/>` +
    `<text class="frozen" x="${x(0)}" y="${y(m.d_in * m.d_out) - 8}">the matrix itself: ${whole(m.d_in * m.d_out)}</text>` +
    `<text class="muted" text-anchor="end" x="${x(even) - 6}" y="${high - foot - 8}">r* = ${whole(Math.round(even))}</text>` +
    `<text class="muted" x="${x(0)}" y="${high - 10}">0</text><circle r="8"/><text class="trained" y="${high - 10}"></text></svg>`);
  const svg = $('.rank-axis').firstChild, label = svg.lastChild, dot = label.previousSibling;
  attribute(dot, 'cx', x(rank));
  attribute(dot, 'cy', y(rank * (m.d_in + m.d_out)));
  attribute(label, 'x', x(rank));
  attribute(label, 'text-anchor', rank > 0.85 * end ? 'end' : rank < 0.12 * end ? 'start' : 'middle');
  put(label, `${rank > 0.03 * end ? '' : '&#160;&#160;&#160;'}rank ${whole(rank)}`);
};

/** A module's layers, side by side, are the backgrounds of one element: an element for each would cost a frame its time. */
const striped = (on, n) => {
  const across = (of) => on.length ? `linear-gradient(90deg, ${on.map((is, i) => `${of(is)} ${100 * i / n}% ${100 * (i + 1) / n}%`)})` : 'none';
  const gaps = n > 1 ? `repeating-linear-gradient(90deg, transparent 0 calc(${100 / n}% - 1px), var(--surface) 0 ${100 / n}%)` : 'none';
  return [gaps, across((is) => is ? 'transparent' : 'color-mix(in srgb, var(--frozen) 55%, var(--surface))'),
    across((is) => is ? 'var(--trained)' : 'transparent')].join(', ');
};

const paintMap = ({each, chosen, rows}) => {
  const {targets, layers} = settings;
  const drawn = layersText(layers, data.n_layers);
  all('.map-row[data-module]').forEach((row, i) => {
    const m = data.modules[i], share = m.parameters ? each[i] / m.parameters : 0;
    row.classList.toggle('targeted', targets.has(m.name));
    row.classList.toggle('shown', m === shown);
    style(row.children[1], '--share', `${30 + 5 * Math.round(14 * Math.sqrt(Math.min(1, share)))}%`);
    put(row.lastChild, chosen[i]
      ? `<b class="trained">${whole(rows[i])}</b> <small>${whole(each[i])} × ${chosen[i]}: ${percent(share)}</small>`
      : `0 <small>of ${whole(m.parameters * (m.layers.length || 1))}</small>`);
    const state = `${drawn} ${targets.has(m.name)}`;
    if (row.drawn === state) return;
    row.drawn = state;
    const cell = row.children[1].firstChild;
    const on = m.layers.length ? m.layers.map((layer) => layers.has(layer)) : [!drawn];
    cell.classList.toggle('on', on.some(Boolean));
    cell.style.backgroundImage = striped(targets.has(m.name) ? on : [], on.length);
  });
  all('.layers button').forEach((button) => attribute(button, 'aria-pressed', layers.has(+button.dataset.layer)));
  put($('.layers-said'), drawn ? `Layers ${drawn}: ${layers.size} of ${data.n_layers}` : `All ${data.n_layers} layers`);
};

const paintTotals = ({trained, saved}) => {
  const full = data.total * data.adam, mine = trained * data.adam;
  const tile = (name, number, note) => `<div><dt>${name}</dt><dd>${number}<small>${note}</small></dd></div>`;
  put($('.totals'), tile('Trained', bold(whole(trained), 'trained'), `of ${whole(data.total)}`) +
    tile('Share', bold(percent(trained / data.total), 'trained'), 'of the model') +
    tile('Adapter file', bold(size(saved * settings.bytes), 'trained'), `${settings.bytes} bytes a parameter`) +
    tile("Adam's two moments", bold(size(mine), ''), `${size(full)} for full fine-tuning: ${mine < full ? size(full - mine) + ' saved' : size(mine - full) + ' more'}`));
};

// --- what the reader does

const set = (name, value) => { settings = {...settings, [name]: value}; };
/** Rank and alpha as a preset would have them; alpha automatic for none. */
const presetOf = (key) => {
  const {rank = settings.rank, alpha = null, over_rank} = PRESETS[key] ?? {};
  return {rank, alpha: over_rank ? over_rank * rank : alpha};
};
/** The preset that the settings are those of; empty for none. */
const presetNow = () => Object.keys(PRESETS).find((key) => {
  const {rank, alpha} = presetOf(key);
  return rank === settings.rank && alpha === settings.alpha;
}) ?? '';
const flip = (kept, one) => { const other = new Set(kept); if (!other.delete(one)) other.add(one); return other; };
const heard = (target) => {
  const {knob: name} = target.dataset;
  if (name === 'rank' || name === 'alpha') {
    const {[name]: _, ...others} = typed, value = target.type === 'range' ? String(data.stops[name][target.value]) : target.value;
    const isRefused = blamed(refusal(data, settings, {[name]: value})) === name;
    typed = isRefused ? {...others, [name]: value} : others;
    if (!isRefused) set(name, +value);
  } else if (name === 'preset') {
    settings = {...settings, ...presetOf(target.value)};
    typed = {};
  } else if (name === 'target') set('targets', flip(settings.targets, target.value));
  else if (name === 'method') {
    const {usual, bytes} = data.methods[target.value];
    settings = {...settings, method: target.value, rank: usual, alpha: null, bytes};
    typed = {};
  }
};
/** Arrow keys move through a group of which one member is in the tab order. */
const walk = (event, members, columns) => {
  const step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns}[event.key];
  const at = members.indexOf(event.target), next = members[at + step];
  if (at < 0 || !next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
};

stage.addEventListener('input', ({target}) => {
  if (!target.dataset.knob) return;
  heard(target);
  if (target.type === 'range') paint(); else released();
});
stage.addEventListener('change', ({target}) => { if (target.dataset.knob) released(); });
stage.addEventListener('click', ({target}) => {
  const layer = target.closest('.layers button'), cell = target.closest('.strip i'), row = target.closest('.map-row[data-module]');
  const some = target.closest('[data-layers]'), ranks = target.closest('.toy-ranks button');
  if (target.closest('[data-knob=automatic]')) {
    set('alpha', null);
    delete typed.alpha;
  }
  else if (layer) set('layers', flip(settings.layers, +layer.dataset.layer));
  else if (some?.matches('button')) {
    const n = data.n_layers, half = Math.ceil(n / 2), keep = {all: () => true, first: (i) => i < half, last: (i) => i >= n - half};
    set('layers', new Set(Array.from({length: n}, (_, i) => i).filter(keep[some.dataset.layers])));
  } else if (cell && row) set('targets', flip(settings.targets, row.dataset.module));
  else if (ranks) { toyRank = +ranks.value; toy(); return toyFinding(); }
  else return;
  released();
});
stage.addEventListener('keydown', (event) => {
  const group = event.target.closest('.layers, .toy-w');
  if (group) walk(event, [...group.querySelectorAll('button, td')], group.matches('.layers') ? 1 : 5);
});
for (const kind of ['pointerover', 'focusin']) stage.addEventListener(kind, ({target}) => {
  const row = target.closest('.map-row[data-module]'), cell = target.closest('.toy-w td');
  if (cell) light(cell);
  if (row && row.dataset.module !== shown.name) {
    shown = data.modules.find((m) => m.name === row.dataset.module);
    if (!refusal(data, settings)) paint();
  }
});
for (const kind of ['pointerout', 'focusout']) stage.addEventListener(kind, ({target}) => { if (target.closest('.toy-w td')) light(null); });
stage.addEventListener('focusout', ({target, relatedTarget}) => {
  if (!stage.contains(relatedTarget)) left();
  if (target.type === 'number' && target.dataset.knob) sync();
});
document.addEventListener('pointerdown', ({target}) => { if (!stage.contains(target)) left(); }, true);
document.addEventListener('visibilitychange', left);
const begin = () => {
  if (!props.value || props.value.moved) return; // the tab has not been opened, or it was moved here
  if (!knob('rank', 'range') || !$('.map')) return setTimeout(begin, 20);
  const {at, ...rest} = props.value, wanted = JSON.stringify(rest);
  read();
  if (built !== wanted) build();
  built = wanted;
  paint();
};
window.addEventListener('peftlab-written', ({detail}) => {
  if (!data || 'picture' in detail) return;
  if (trainsNothing(data, settings)) { read(); paint(); } // which was not written, and so is not undone
  if ('model' in detail) settings = {...settings, ...everything()}; // modules and layers are a model's
});
begin();
watch('value', begin);
new ResizeObserver(() => {
  const axis = data && $('.rank-axis').clientWidth;
  if (!axis || Math.max(260, axis) === width) return;
  width = Math.max(260, axis);
  if (!refusal(data, settings)) paintAxis();
}).observe(element);
