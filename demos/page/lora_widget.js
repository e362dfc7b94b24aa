// Draws the LoRA tab. The server sends a model's shapes and the registry's terms; this answers every slider, tick and click
// after that by itself, and writes it to the page's settings, which ask the server once the reader pauses.

const stage = element.closest('.stage');
let data, settings, shown, typed = {}; // shown: the module whose matrices are drawn; typed: refused numbers, as typed
let built, late = 0, places = {}, width = 600;

const $ = (name) => places[name] ??= stage.querySelector(`.main ${name}`);
const all = (name) => places[name + ' all'] ??= [...stage.querySelectorAll(name)];
/** Writes HTML where it differs from what is there. Where only the words between the tags differ, it writes only these:
 * to parse and lay out the rest again took a third of a slow frame. */
const put = (place, html) => {
  if (place.written === html) return;
  const parts = html.split(/(<[^>]*>)/), texts = parts.filter((part, i) => part && i % 2 === 0); // tags are at odd places
  const tags = parts.map((part, i) => i % 2 ? part : part && ' ').join('');
  if (place.tags !== tags || html.includes('&')) {
    place.innerHTML = html;
    place.texts = textsOf(place);
  } else texts.forEach((text, i) => { if (place.texts[i].data !== text) place.texts[i].data = text; });
  Object.assign(place, {written: html, tags});
};
const textsOf = (node) => [...node.childNodes].flatMap((child) => child.data === undefined ? textsOf(child) : [child]);
const style = (place, name, value) => {
  if (place.style.getPropertyValue(name) !== value) place.style.setProperty(name, value);
};
const enter = (input, value) => { if (input.value !== String(value)) input.value = value; };
const attribute = (place, name, value) => {
  if (place.getAttribute(name) !== String(value)) place.setAttribute(name, value);
};
const knob = (name, kind) => stage.querySelector(`[data-knob="${name}"]${kind ? `[type=${kind}]` : ''}`);
/** The numbers that a slider stops at: each one up to 16, then eight in each doubling, up to the largest. */
const stops = (top) => {
  const numbers = [];
  for (let n = 1; n < top; n += 2 ** Math.max(0, Math.floor(Math.log2(n)) - 3)) numbers.push(n);
  return [...numbers, top];
};
const nearest = (numbers, one) => Math.min(numbers.filter((n) => n < one).length, numbers.length - 1);
const evenOf = (m) => m.d_in * m.d_out / (m.d_in + m.d_out);

const layersFrom = (first, end) => new Set(Array.from({length: end - first}, (_, i) => first + i));
/** Takes the settings from the server's answer, but keeps the value of a slider that the reader holds. */
const read = () => {
  const held = stage.querySelector('[type=range][data-knob]:active')?.dataset.knob, mine = settings?.[held];
  data = {...props.value};
  const {method, rank, alpha, targets, layers, refused} = data.at;
  settings = {method, rank, bytes: data.bytes, alpha: alpha ?? null, targets: new Set(targets), layers: new Set(layers)};
  if (held) settings[held] = mine;
  typed = {...refused};
  const largest = Math.max(...data.modules.map((m) => m.full_rank));
  data.stops = {rank: stops(largest), alpha: stops(Math.max(2 * largest, data.at.alpha ?? 0))};
  const is = (test) => data.modules.find((m) => test(m.name));
  shown = is((name) => name === shown?.name) ?? is((name) => targets.includes(name)) ?? data.modules[0];
};

/** Writes what is set here to the page's settings, a refused number as it was typed. A method is written only where it is
 * another one, because writing one makes its settings automatic. */
const report = () => {
  stage.querySelectorAll('.knob .refusal').forEach((old) => old.remove());
  if (trainsNothing(data, settings)) return;
  const layers = layersText(settings.layers, data.n_layers);
  const asSent = layers === layersText(new Set(data.at.layers), data.n_layers);
  props.value = {...props.value, moved: true}; // so that Gradio shows an answer that takes the move back: it is a change
  const targets = targetsText(data, settings.targets);
  const isUsual = settings.rank === data.methods[settings.method].usual;
  peftlab.heard('lora.picture', null, true, {
    ...(settings.method === (peftlab.get().state.method ?? OPENING.method) ? {} : {method: settings.method}),
    rank: isUsual ? null : settings.rank, alpha: settings.alpha,
    ...Object.fromEntries(Object.entries(typed).filter(([, text]) => text)),
    target_modules: targets === 'all-linear' ? null : targets, layers: asSent ? data.at.layers_said : layers || null,
  });
};
/** Asks the server at once when the reader leaves the tab: what they open next is to show the new settings. */
const left = () => { if (peftlab.get().resting) peftlab.write({}); };
const released = () => { paint(); report(); };

const set = (name, value) => { settings = {...settings, [name]: value}; };
/** Rank and alpha of a preset, where null makes alpha automatic; without a preset, the present rank. */
const presetOf = (key) => {
  const {rank = settings.rank, alpha = null, over_rank} = PRESETS[key] ?? {};
  return {rank, alpha: over_rank ? over_rank * rank : alpha};
};
/** The key of the preset with these settings; empty where there is none. */
const presetNow = () => Object.keys(PRESETS).find((key) => {
  const {rank, alpha} = presetOf(key);
  return rank === settings.rank && alpha === settings.alpha;
}) ?? '';
const flip = (kept, one) => {
  const other = new Set(kept);
  if (!other.delete(one)) other.add(one);
  return other;
};
const heard = (target) => {
  const {knob: name} = target.dataset;
  if (name === 'rank' || name === 'alpha') {
    const {[name]: _, ...others} = typed;
    const value = target.type === 'range' ? String(data.stops[name][target.value]) : target.value;
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
/** Moves the focus by arrow keys through a group, of which only the member in focus is in the tab order. */
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
  const layer = target.closest('.layers button'), some = target.closest('[data-layers]');
  const row = target.closest('.strip i') && target.closest('.map-row[data-module]');
  const ranks = target.closest('.toy-ranks button'), n = data?.n_layers, half = Math.ceil(n / 2);
  if (target.closest('[data-knob=automatic]')) {
    set('alpha', null);
    delete typed.alpha;
  } else if (layer) set('layers', flip(settings.layers, +layer.dataset.layer));
  else if (some) set('layers', layersFrom(some.dataset.layers === 'last' ? n - half : 0, some.dataset.layers === 'first' ? half : n));
  else if (row) set('targets', flip(settings.targets, row.dataset.module));
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
for (const kind of ['pointerout', 'focusout'])
  stage.addEventListener(kind, ({target}) => { if (target.closest('.toy-w td')) light(null); });
stage.addEventListener('focusout', ({target, relatedTarget}) => {
  if (!stage.contains(relatedTarget)) left();
  if (target.type === 'number' && target.dataset.knob) sync();
});
document.addEventListener('pointerdown', ({target}) => { if (!stage.contains(target)) left(); }, true);
document.addEventListener('visibilitychange', left);
const begin = () => {
  if (!props.value || props.value.moved) return; // nothing is sent yet, or the change is this page's own
  if (!knob('rank', 'range') || !$('.map')) return setTimeout(begin, 20);
  const {at, ...rest} = props.value, wanted = JSON.stringify(rest);
  read();
  if (built !== wanted) build();
  built = wanted;
  paint();
};
window.addEventListener('peftlab-written', ({detail}) => {
  if (!data || 'picture' in detail) return;
  if (trainsNothing(data, settings)) { read(); paint(); } // a choice of nothing was not written, so no answer undoes it
  if ('model' in detail) { // modules and layers are a model's: all linear modules, and all layers
    set('targets', new Set(data.modules.filter((m) => m.role !== 'head').map((m) => m.name)));
    set('layers', layersFrom(0, data.n_layers));
  }
});
begin();
watch('value', begin);
new ResizeObserver(() => {
  const axis = data && $('.rank-axis').clientWidth;
  if (!axis || Math.max(260, axis) === width) return;
  width = Math.max(260, axis);
  if (!refusal(data, settings)) paintAxis();
}).observe(element);
