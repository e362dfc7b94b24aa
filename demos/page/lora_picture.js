// Draws the LoRA tab's picture. lora_widget.js, which follows this, has the settings and calls `build` and `paint`.

const box = (name, meaning) =>
  `<figure class="matrix ${meaning}"><div></div><figcaption><b>${name}</b> <span></span></figcaption></figure>`;
const build = () => {
  places = {};
  const sign = (text, more = '') => `<span class="sign${more}">${text}</span>`;
  $('.matrices').innerHTML = box('W', 'frozen') + sign('+') + '<div class="update">' + box('ΔW', 'trained delta') + sign('=') +
    sign('', ' times') + box('B', 'trained') + sign('×') + box('A', 'trained') + '</div>';
  const rows = [...data.modules.map((m) => [m.name, m.parameters * (m.layers.length || 1), m]),
    ...data.rest.map((r) => [r.name, r.parameters, null])];
  stage.classList.toggle('long-names', data.modules.some((m) => m.label.includes('.')));
  const unit = 230 / sum(rows.map(([, n]) => n));
  $('.map').innerHTML = rows.map(([name, n, m]) => {
    const strip = `<div class="strip" style="height:${Math.max(1, n * unit).toFixed(1)}px"><i></i></div>`;
    if (!m) return `<div class="map-row rest"><span class="map-name">${name}</span>${strip}` +
      `<span class="map-count">${whole(n)} frozen</span></div>`;
    return `<div class="map-row" data-module="${name}"><label title="${m.path}"><input type="checkbox" data-knob="target" ` +
      `value="${name}"><span>${m.label}</span></label>${strip}<output></output></div>`;
  }).join('');
  $('.layers').innerHTML = Array.from({length: data.n_layers}, (_, i) =>
    `<button type="button" data-layer="${i}" tabindex="${i ? -1 : 0}" aria-label="layer ${i}"></button>`).join('');
  toy();
};

const paint = () => {
  const wrong = refusal(data, settings, typed);
  for (const name of ['', 'rank', 'alpha'])
    put(stage.querySelector(`.here[data-of="${name}"]`), blamed(wrong) === name ? wrong : '');
  sync();
  if (refusal(data, settings)) return;
  put($('.sentence'), sentence(data, settings, count(data, settings)));
  paintMatrices();
  if (!late) late = requestAnimationFrame(() => { late = requestAnimationFrame(paintRest); });
};

/** Draws the other parts a frame later, with the settings as they are by then. */
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
    const isTyped = document.activeElement === number && (number.value === '' || +number.value === +said);
    if (!isTyped) enter(number, said);
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
    const n = whole(high * wide), note = [`${n} frozen`, 'as large as W', `${n} trained`, `${n} trained`][i];
    put(figure.lastChild.lastChild, `${whole(high)} × ${whole(wide)}<small>${note}</small>`);
  });
  put($('.times'), `${significant(scaleOf(data, settings))} ×`);
  attribute($('.matrices'), 'aria-label', fill(WORDS.spoken, {d_out: m.d_out, d_in: m.d_in, rank}));
};

const paintFindings = ({each}) => {
  const m = shown, {rank} = settings, scale = scaleOf(data, settings), {root} = data.methods[settings.method];
  for (const name of ['.delta', '.toy']) style($(name), '--breath', (scale / (scale + 1)).toFixed(3));
  const even = evenOf(m), one = each[data.modules.indexOf(m)], base = m.d_in * m.d_out;
  const times = significant(even / rank);
  const past = fill(WORDS[rank >= even ? 'past' : 'before'], {rank, even: Math.round(even), times});
  put($('.finding'), fill(WORDS.matrix, {name: m.path, one: whole(one), base: whole(base), share: percent(one / base)}) +
    ' ' + past + (m.swapped ? ' ' + WORDS.swapped : ''));
  const alpha = alphaOf(data, settings);
  put($('.scale'), alpha === null ? WORDS.no_alpha : fill(WORDS.scale, {
    alpha: significant(alpha), rank, plain: bold(significant(alpha / rank), root ? '' : 'trained'),
    root: bold(significant(alpha / Math.sqrt(rank)), root ? 'trained' : ''),
  }));
  toyFinding();
};

const paintAxis = () => {
  const m = shown, even = evenOf(m), {rank} = settings, end = Math.max(1.25 * even, 1.15 * rank);
  const base = m.d_in * m.d_out, each = m.d_in + m.d_out; // parameters of the matrix, and of one rank of its adapter
  const high = 190, left = 4, right = 12, top = 26, floor = high - 34;
  const most = Math.max(base, rank * each) * 1.08;
  const x = (r) => left + (width - left - right) * r / end, y = (n) => floor - (floor - top) * n / most;
  put($('.rank-axis'), `<svg viewBox="0 0 ${width} ${high}" width="${width}" height="${high}" role="img" ` +
    `aria-label="${fill(WORDS.axis, {even: Math.round(even)})}">` +
    `<rect class="past" x="${x(even)}" y="${top}" width="${x(end) - x(even)}" height="${floor - top}"/>` +
    `<path class="frozen" d="M${x(0)} ${y(base)}H${x(end)}"/>` +
    `<path class="trained" d="M${x(0)} ${y(0)}L${x(end)} ${y(end * each)}"/>` +
    `<path class="even" d="M${x(even)} ${top}V${floor}"/><path class="base" d="M${x(0)} ${floor}H${x(end)}"/>` +
    `<text class="frozen" x="${x(0)}" y="${y(base) - 8}">the matrix itself: ${whole(base)}</text>` +
    `<text class="muted" text-anchor="end" x="${x(even) - 6}" y="${floor - 8}">r* = ${whole(Math.round(even))}</text>` +
    `<text class="muted" x="${x(0)}" y="${high - 10}">0</text><circle r="8"/>` +
    `<text class="trained" y="${high - 10}"></text></svg>`);
  const svg = $('.rank-axis').firstChild, label = svg.lastChild, dot = label.previousSibling;
  attribute(dot, 'cx', x(rank));
  attribute(dot, 'cy', y(rank * each));
  attribute(label, 'x', x(rank));
  attribute(label, 'text-anchor', rank > 0.85 * end ? 'end' : rank < 0.12 * end ? 'start' : 'middle');
  put(label, `${rank > 0.03 * end ? '' : '&#160;&#160;&#160;'}rank ${whole(rank)}`);
};

/** A module's layers, side by side, as backgrounds of one element: an element for each would be too slow for a frame. */
const striped = (on, n) => {
  const stripe = (colour, i) => `${colour} ${100 * i / n}% ${100 * (i + 1) / n}%`;
  const across = (yes, no) => on.length ? `linear-gradient(90deg, ${on.map((is, i) => stripe(is ? yes : no, i))})` : 'none';
  const gap = `transparent 0 calc(${100 / n}% - 1px), var(--surface) 0 ${100 / n}%`;
  return [n > 1 ? `repeating-linear-gradient(90deg, ${gap})` : 'none',
    across('transparent', 'color-mix(in srgb, var(--frozen) 55%, var(--surface))'),
    across('var(--trained)', 'transparent')].join(', ');
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
  const less = mine < full ? `${size(full - mine)} saved` : `${size(mine - full)} more`;
  const tile = (name, number, note) => `<div><dt>${name}</dt><dd>${number}<small>${note}</small></dd></div>`;
  put($('.totals'), tile('Trained', bold(whole(trained), 'trained'), `of ${whole(data.total)}`) +
    tile('Share', bold(percent(trained / data.total), 'trained'), 'of the model') +
    tile('Adapter file', bold(size(saved * settings.bytes), 'trained'), `${settings.bytes} bytes a parameter`) +
    tile("Adam's two moments", bold(size(mine), ''), `${size(full)} for full fine-tuning: ${less}`));
};
