// This file holds the page's settings, and everything that changes one writes here. The address shows what is held here, the
// server says what it looks like, and only an answer to the newest question counts.

// store.py fills this in: tabs, of which the first is the usual one; nats, that word with its meaning; run, the names of a
// run's settings; clears, the names that become automatic when another one is written; folds, their names by element;
// outputs, the names of all components in order.
const GIVEN = /*given*/{};
const DRAWN = 150; // milliseconds that Gradio needs to draw an update
const REST = 400; // milliseconds after which a slider or a text box that is not moved counts as at rest
const PATIENCE = 30_000, LONG = 300_000; // milliseconds after which a quick or an exact answer counts as lost
const ALIVE = 10_000; // milliseconds after which a stream that says nothing counts as lost
const LONGEST = 10_000; // letters of the longest value that an address carries

let tab = GIVEN.tabs[0], state = {}, open = new Set();
let number = 0, failures = 0; // the newest question's number; answers that failed in a row
let resting = 0, looking = 0, refusing = 0; // timers
let pending = {}, shown = {}, held = {}; // updates that Gradio is to take; what each output shows, as JSON; updates of a box in use

const STORAGE = 'peftlab'; // under which the browser keeps ids of runs and adapters, which no link carries
const DAYS = 30 * 86_400; // seconds for which a cookie keeps the same, in a frame that has no storage
const cookie = () => document.cookie.match(/(?:^|; )peftlab=([^;]+)/)?.[1] ?? '{}';
const tried = (first, second) => { try { return first(); } catch { try { return second(); } catch { return null; } } };
const remembered = () => tried(() => JSON.parse(localStorage.getItem(STORAGE)), () => null) ?? tried(() => JSON.parse(decodeURIComponent(cookie())), () => null) ?? {};
const memory = remembered(); // the visitor's token comes with the first answer
const keep = (more) => {
  Object.assign(memory, remembered(), more); // another window may have kept something since
  const text = JSON.stringify(memory), partitioned = `max-age=${DAYS}; path=${location.pathname}; secure; samesite=none; partitioned`;
  tried(() => localStorage.setItem(STORAGE, text), () => { document.cookie = `${STORAGE}=${encodeURIComponent(text)}; ${partitioned}`; });
};

/** The address leaves out long texts and ids of runs; the browser's history holds those. */
const isPublic = (name, value) => value.length <= LONGEST && (name === 'run' || !/-[0-9a-f]{32}$/.test(value));
const read = () => {
  state = {...history.state?.peftlab};
  tab = GIVEN.tabs[0];
  for (const [name, value] of new URLSearchParams(location.search))
    if (name === 'tab') tab = GIVEN.tabs.includes(value) ? value : tab;
    else if (name === 'key') keep({key: value});
    else if (value && !name.startsWith('__')) state[name] = value;
};
const sorted = (search) => { const all = new URLSearchParams(search); all.sort(); return String(all); };
const record = (how) => {
  const url = new URL(location.href), search = new URLSearchParams(), hidden = {};
  for (const [name, value] of Object.entries(state)) if (isPublic(name, value)) search.set(name, value); else hidden[name] = value;
  if (tab !== GIVEN.tabs[0]) search.set('tab', tab);
  url.searchParams.forEach((value, name) => { if (name.startsWith('__')) search.set(name, value); });
  url.search = search;
  const isHere = JSON.stringify(hidden) === JSON.stringify(history.state?.peftlab ?? {});
  if (isHere && url.href === location.href) return;
  if (isHere && sorted(url.search) === sorted(location.search)) how = 'replaceState'; // nothing that Back could undo
  history[how]({peftlab: hidden}, '', url);
  tell();
};
/** Tells the page around a frame the query: people see that page's address, not this one's. */
const tell = () => {
  const message = {queryString: location.search.slice(1), hash: location.hash.slice(1)};
  if (window.parent !== window) window.parent.postMessage(message, '*');
};

const pause = (time) => new Promise((done) => setTimeout(done, time));
/** A lane has one question under way; the newest one that waits is next; a lost answer is asked for again. */
const lane = (ask, take, patience) => {
  let busy = false, next = null;
  const work = async () => {
    busy = true;
    while (next) {
      const question = next;
      next = null;
      try {
        const answer = await Promise.race([ask(question), pause(patience)]);
        if (!answer?.show) throw new Error('no answer');
        failures = 0;
        if (question.number === number) take(answer, question);
      } catch {
        failures += 1;
        await pause(Math.min(1000, 50 * 2 ** failures));
        if (question.number === number) next ??= question;
      }
      document.body.classList.toggle('unanswered', failures > 3);
    }
    busy = false;
  };
  return (question) => { next = question; if (!busy) work(); };
};
const question = () => ({number, tab, state, kept: {...memory}, open: [...open]});
const quick = lane((asked) => server.answer(asked), (answer, asked) => {
  if (answer.visitor && memory.visitor === asked.kept.visitor) keep({visitor: answer.visitor}); // else a press brought one
  state = answer.state;
  record('replaceState');
  show(answer.show);
  clearTimeout(refusing); // until Gradio has drawn the controls
  refusing = setTimeout(() => refuse(answer.problems), Object.keys(answer.problems).length ? DRAWN : 0);
  clearTimeout(looking);
  follow(answer.follow);
  if (answer.again) looking = setTimeout(again, 1000 * answer.again);
  if (answer.slow) exact(question());
}, PATIENCE);
const exact = lane((asked) => server.exact(asked), (answer) => show(answer.show), LONG);
const look = () => quick(question());

let followed = '', stream = null, heardOf = 0; // the run whose picture comes by itself; when it last came
/** Follows a run until it is over, or another one is to be followed. Where no stream gets through, the page asks instead. */
const follow = (run) => {
  if (followed === (run ?? '')) return;
  stream?.close();
  followed = run ?? '';
  heardOf = 0;
  if (!run) return;
  stream = new EventSource(`gradio_api/peftlab/follow/${run}`); // it begins again by itself, after a sleep too
  stream.onmessage = ({data}) => {
    heardOf = Date.now();
    if (followed === run) show(JSON.parse(data));
  };
  stream.onerror = () => { heardOf = 0; }; // then the page asks, and finds out whether the server is there
  stream.addEventListener('over', () => { follow(null); look(); });
};
const again = () => {
  if (followed && Date.now() - heardOf < ALIVE) looking = setTimeout(again, 500); else look();
};

const stopResting = () => { clearTimeout(resting); resting = 0; };
const settled = () => { stopResting(); record('pushState'); look(); };
/** Changes settings. An empty value makes one automatic. With `atRest` the server is asked only once nothing moves. */
const write = (patch, atRest = false) => {
  if (resting && !atRest) settled();
  const next = {...state};
  delete next.v; // the version of the link that was opened: from now on these are this page's own settings
  for (const name in patch) if (patch[name] !== '') for (const cleared of GIVEN.clears[name] ?? []) delete next[cleared];
  for (const [name, value] of Object.entries(patch)) {
    const text = Array.isArray(value) ? value.join(';') || 'none' : String(value ?? '');
    if (text === '') delete next[name]; else next[name] = text;
  }
  state = next;
  for (const name in shown) if (name.endsWith('problem')) shown[name] = null; // a press has said it of the old settings
  window.dispatchEvent(new CustomEvent('peftlab-written', {detail: patch}));
  number += 1;
  stopResting();
  if (atRest) resting = setTimeout(settled, REST); else settled();
};
/** The page has drawn this output itself; the next answer is to draw it in any case. */
const redrawn = (name) => {
  shown[name] = null;
  delete held[name];
};
/** A control was moved, and the settings follow it. */
const heard = (control, value, atRest = false, also = {}) => {
  redrawn(control);
  write({[control.split('.')[1]]: value, ...also}, atRest);
};
const blockOf = (control) => document.getElementById(control.replace('.', '-'));
/** A list of several choices changed. Gradio tells so of a key press and of an answer alike; only the former is written. */
const picked = (control, value) => {
  const filled = JSON.parse(shown[control] ?? 'null')?.value, isHere = blockOf(control).contains(document.activeElement);
  const isNews = JSON.stringify(value) !== JSON.stringify(filled) && value.join(';') !== state[control.split('.')[1]];
  if (isHere && isNews) heard(control, value);
};
const go = (to) => {
  if (to === tab || !GIVEN.tabs.includes(to)) return;
  if (!navigator.userActivation.hasBeenActive) return; // Gradio itself selects its first tab as the page loads
  if (resting) settled();
  tab = to;
  number += 1;
  settled();
};

const show = (updates) => {
  for (const [name, update] of Object.entries(updates)) {
    const text = JSON.stringify(update);
    if (shown[name] === text) continue;
    if (isBeingTyped(name)) { held[name] = update; continue; }
    shown[name] = text;
    pending[name] = update;
  }
  if (Object.keys(pending).length) trigger('submit');
};
/** Nothing is shown in a box that somebody types in, until they leave it: they may be in the middle of a number. */
const isBeingTyped = (name) => {
  const block = blockOf(name);
  return block?.matches('.typed') && block.contains(document.activeElement);
};
/** Gives Gradio the pending updates, in the order of its outputs. */
const take = () => {
  const taken = pending;
  pending = {};
  return GIVEN.outputs.map((name) => taken[name] ?? {__type__: 'update'});
};
/** Places refusals beside their controls; those without a control in sight go to the top. */
const refuse = (problems) => {
  document.querySelectorAll('.refusal').forEach((old) => old.remove());
  const rest = [];
  for (const [name, text] of Object.entries(problems)) {
    const place = document.getElementById(`${tab}-${name}`);
    const refusal = {className: 'problem refusal', role: 'alert', textContent: text};
    if (place?.offsetParent) place.append(Object.assign(document.createElement('div'), refusal)); else rest.push(text);
  }
  show({[`${tab}.problem`]: rest.join(' ')});
};
const showTab = () => {
  pending['store.tabs'] = {__type__: 'update', selected: tab};
  trigger('submit');
};

/** Draws a chart. Unlike gr.Plot, this puts the title into the page, where it can wrap, keeps the zoom, does not flicker, and
 * follows the reader's theme. */
const plot = (element, props, watch) => {
  const draw = () => {
    const figure = props.value && props.value[document.body.classList.contains('dark') ? 'dark' : 'light'];
    const place = element.querySelector('.plot');
    if (!figure || !window.Plotly || !place) return;
    const {title, ...layout} = figure.layout, heading = element.querySelector('h3');
    heading.textContent = title.text;
    heading.innerHTML = heading.innerHTML.replace(/\bnats\b/, GIVEN.nats);
    place.style.minHeight = layout.height + 'px';
    window.Plotly.react(place, figure.data, layout, {displayModeBar: false, responsive: true});
  };
  const wait = () => window.Plotly ? draw() : setTimeout(wait, 50);
  wait();
  watch('value', draw);
  new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
  new ResizeObserver(() => {
    const place = element.querySelector('.plot');
    if (window.Plotly && place && place.layout && place.offsetWidth) window.Plotly.Plots.resize(place);
  }).observe(element);
};

keep({});
/** What a press gives the browser to keep. A run of one's own takes the place of the one that a link brought. */
const kept = (more) => {
  keep(more);
  if (more.run && state.run) write({run: ''}); else look();
};
/** A press is over. It has drawn these outputs past this file, whose next answer draws them as they are to be. */
const pressed = (names, text) => {
  names.forEach(redrawn);
  if (text) kept(JSON.parse(text));
};
window.peftlab = {write, heard, picked, redrawn, go, plot, take, question, keep: kept, pressed,
  get: () => ({tab, state, number, kept: memory, resting: Boolean(resting)})};
document.addEventListener('input', ({target}) => {
  const block = target.closest('.typed');
  if (block) heard(block.id.replace('-', '.'), target.value, true);
});
/** Copies an address; where the browser refuses that, the address takes the button's place, to be copied by hand. */
const copy = async (button) => {
  const link = new URL(button.dataset.copy || location.href, location.href).href;
  const field = Object.assign(document.createElement('input'), {value: link, readOnly: true, className: 'copied-link'});
  const byHand = () => {
    button.after(field);
    field.select();
    return document.execCommand('copy'); // an older way, which needs no permission
  };
  const done = await (navigator.clipboard?.writeText(link) ?? Promise.reject()).then(() => true, byHand);
  if (!done) { button.remove(); return; }
  field.remove();
  button.dataset.says ??= button.innerHTML; // a second press finds 'Copied' in it
  button.textContent = 'Copied';
  setTimeout(() => { button.innerHTML = button.dataset.says; }, 2000);
};
document.addEventListener('click', ({target}) => {
  const replaces = target.closest('[data-replace]'), folds = target.closest('.fold .label-wrap');
  const copies = target.closest('[data-copy]'), opens = target.closest('[data-opens]');
  if (copies) copy(copies);
  if (opens) { // another tab, with settings of its own
    if (resting) settled();
    tab = opens.dataset.opens;
    showTab();
    write(JSON.parse(opens.dataset.write));
  }
  if (replaces) { // another run: what it does not name becomes automatic, but for the settings to keep
    const {replace, keeping} = replaces.dataset, gone = GIVEN.run.filter((name) => !JSON.parse(keeping).includes(name));
    write({...Object.fromEntries(gone.map((name) => [name, ''])), ...JSON.parse(replace)});
  }
  if (folds) setTimeout(() => {
    const name = GIVEN.folds[folds.closest('.fold').id];
    if (folds.classList.contains('open')) { open.add(name); look(); } else open.delete(name);
  });
});
document.addEventListener('focusout', () => setTimeout(() => { const late = held; held = {}; show(late); }));
window.addEventListener('storage', ({key}) => {
  if (key !== STORAGE) return;
  Object.assign(memory, remembered());
  look(); // another window has started, stopped or resumed something
});
window.addEventListener('pagehide', () => { if (resting) record('replaceState'); });
window.addEventListener('popstate', () => {
  stopResting();
  document.activeElement?.blur(); // so that the box shows what Back brings, instead of what was typed
  read();
  tell();
  number += 1;
  showTab();
  look();
});
read();
if (tab !== GIVEN.tabs[0]) showTab();
if (location.search) look(); else exact(question());
