// The settings of the page, which owns them. Controls, links, Back, presets and lessons write here and nowhere else; the
// address shows what is here; the server is asked what it looks like, and an answer to any but the newest question is dropped.

const GIVEN = /*given*/{};  // {tabs: the first is the usual one, nats: the word explained, run: names of a run's settings, clears: {name: names}, outputs: names in order}
const DRAWN = 150; // milliseconds until Gradio has drawn an update
const REST = 400; // milliseconds without a move after which a slider or a text box counts as at rest
const PATIENCE = 30_000, LONG = 300_000; // milliseconds after which an answer is taken for lost: a quick one, an exact one
const LONGEST = 10_000; // letters of a value that an address still carries

let tab = GIVEN.tabs[0], state = {}, open = new Set();
let number = 0; // of the newest question
let resting = 0, looking = 0, refusing = 0; // timers
let pending = {}, shown = {}; // updates that wait for Gradio to take them; what each output shows, as JSON
let failures = 0;

// --- what the browser keeps for itself: ids of runs and adapters, which no link carries

const STORAGE = 'peftlab';
const remembered = () => { try { return JSON.parse(localStorage.getItem(STORAGE)) ?? {}; } catch { return {}; } };
const memory = Object.assign({visitor: crypto.randomUUID?.() ?? String(Math.random()).slice(2), adapters: []}, remembered());
const keep = (more) => {
  Object.assign(memory, remembered(), more); // another window may have kept something since
  try { localStorage.setItem(STORAGE, JSON.stringify(memory)); } catch { /* a frame may have no storage: then this visit's are kept */ }
};

// --- the address

/** Long texts and ids of runs are no part of a link: the browser's history holds them. */
const isPublic = (value) => value.length <= LONGEST && !/-\d{6}-[0-9a-f]{6}$/.test(value);
const read = () => {
  state = {...history.state?.peftlab};
  tab = GIVEN.tabs[0];
  for (const [name, value] of new URLSearchParams(location.search))
    if (name === 'tab') tab = GIVEN.tabs.includes(value) ? value : tab;
    else if (value && !name.startsWith('__')) state[name] = value;
};
const sorted = (search) => { const all = new URLSearchParams(search); all.sort(); return String(all); };
const record = (how) => {
  const url = new URL(location.href), search = new URLSearchParams(), hidden = {};
  for (const [name, value] of Object.entries(state)) if (isPublic(value)) search.set(name, value); else hidden[name] = value;
  if (tab !== GIVEN.tabs[0]) search.set('tab', tab);
  url.searchParams.forEach((value, name) => { if (name.startsWith('__')) search.set(name, value); });
  url.search = search;
  const isHere = JSON.stringify(hidden) === JSON.stringify(history.state?.peftlab ?? {});
  if (isHere && url.href === location.href) return;
  if (isHere && sorted(url.search) === sorted(location.search)) how = 'replaceState'; // no change that Back could undo
  history[how]({peftlab: hidden}, '', url);
  tell();
};
/** The page around a frame, which shows the address that people see. */
const tell = () => {
  if (window.parent !== window) window.parent.postMessage({queryString: location.search.slice(1), hash: location.hash.slice(1)}, '*');
};

// --- lanes: one question under way in each, the last one wins, a lost answer is asked again

const pause = (time) => new Promise((done) => setTimeout(done, time));
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
        if (question.number === number) take(answer);
      } catch {
        failures += 1;
        await pause(Math.min(1000, 50 * 2 ** failures)); // twice as long each time, up to a second
        if (question.number === number) next ??= question;
      }
      document.body.classList.toggle('unanswered', failures > 3);
    }
    busy = false;
  };
  return (question) => { next = question; if (!busy) work(); };
};
const question = () => ({number, tab, state, kept: {...memory}, open: [...open]});
const quick = lane((asked) => server.answer(asked), (answer) => {
  state = answer.state;
  record('replaceState');
  show(answer.show);
  refuse(answer.problems);
  clearTimeout(looking);
  if (answer.again) looking = setTimeout(look, 1000 * answer.again);
  if (answer.slow) exact(question());
}, PATIENCE);
const exact = lane((asked) => server.exact(asked), (answer) => show(answer.show), LONG);
const look = () => quick(question());

// --- writing

const settled = (how = 'pushState') => {
  clearTimeout(resting);
  resting = 0;
  record(how);
  look();
};
const write = (patch, atRest = false) => {
  if (resting && !atRest) settled();
  const next = {...state}, cleared = Object.keys(patch).flatMap((name) => patch[name] === '' ? [] : GIVEN.clears[name] ?? []);
  for (const name of cleared) delete next[name];
  for (const [name, value] of Object.entries(patch)) {
    const text = Array.isArray(value) ? value.join(';') || 'none' : value === null || value === undefined ? '' : String(value);
    if (text === '') delete next[name]; else next[name] = text;
  }
  state = next;
  for (const name in shown) if (name.endsWith('problem')) shown[name] = null; // what a press said of the settings before
  window.dispatchEvent(new CustomEvent('peftlab-written', {detail: patch}));
  number += 1;
  clearTimeout(resting);
  resting = 0;
  if (atRest) resting = setTimeout(settled, REST); else settled();
};
/** Another run: a lesson's settings, or with none, of the present ones those that are `keeping`. */
const replace = (run, keeping = []) => {
  const gone = GIVEN.run.filter((name) => !keeping.includes(name));
  write({...Object.fromEntries(gone.map((name) => [name, ''])), ...run});
};
/** What the page itself has drawn is to be drawn anew by the next answer. */
const redrawn = (name) => {
  shown[name] = null;
  delete held[name];
};
/** A control was moved. What it says now need not be shown to it again, unless it is another number than was typed. */
const heard = (control, value, atRest = false, also = {}) => {
  redrawn(control);
  write({[control.split('.')[1]]: value, ...also}, atRest);
};
/** A list of several was changed by a key, of which Gradio tells only together with the changes that an answer makes. */
const picked = (control, value) => {
  const filled = JSON.parse(shown[control] ?? 'null')?.value, isHere = document.getElementById(control.replace('.', '-')).contains(document.activeElement);
  const isNews = JSON.stringify(value) !== JSON.stringify(filled) && value.join(';') !== state[control.split('.')[1]];
  if (isHere && isNews) heard(control, value);
};
const go = (to) => {
  if (to === tab || !GIVEN.tabs.includes(to)) return;
  if (!navigator.userActivation.hasBeenActive) return; // Gradio selects its first tab as the page loads
  if (resting) settled();
  tab = to;
  number += 1;
  settled();
};
const fold = (name, isOpen) => {
  if (isOpen) open.add(name); else open.delete(name);
  if (isOpen) look();
};

// --- showing

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
/** What somebody types stays as they type it, for they may be in the middle of a number, until they leave the box. */
let held = {};
const isBeingTyped = (name) => {
  const block = document.getElementById(name.replace('.', '-'));
  return block?.matches('.typed') && block.contains(document.activeElement);
};
/** The updates for Gradio, in the order of its outputs. */
const take = () => {
  const taken = pending;
  pending = {};
  return GIVEN.outputs.map((name) => taken[name] ?? {__type__: 'update'});
};
/** A refusal stands beside its control, once Gradio has drawn that; where the tab has none for it, at the top. */
const refuse = (problems) => {
  clearTimeout(refusing);
  refusing = setTimeout(() => placed(problems), Object.keys(problems).length ? DRAWN : 0);
};
const placed = (problems) => {
  document.querySelectorAll('.refusal').forEach((old) => old.remove());
  const rest = [];
  for (const [name, text] of Object.entries(problems)) {
    const place = document.getElementById(`${tab}-${name}`);
    if (!place?.offsetParent) { rest.push(text); continue; }
    place.append(Object.assign(document.createElement('div'), {className: 'problem refusal', role: 'alert', textContent: text}));
  }
  show({[`${tab}.problem`]: rest.join(' ')});
};
const showTab = () => {
  pending['store.tabs'] = {__type__: 'update', selected: tab};
  trigger('submit');
};

// --- beginning

keep({});
window.peftlab = {write, replace, heard, picked, redrawn, go, look, plot, take, question, keep: (more) => { keep(more); look(); },
  get: () => ({tab, state, number, kept: memory, resting: Boolean(resting)})};
document.addEventListener('input', ({target}) => {
  const block = target.closest('.typed');
  if (block) heard(block.id.replace('-', '.'), target.value, true);
});
document.addEventListener('click', ({target}) => {
  const writes = target.closest('[data-write]'), replaces = target.closest('[data-replace]'), folds = target.closest('.fold .label-wrap');
  if (writes) write(JSON.parse(writes.dataset.write));
  if (replaces) replace(JSON.parse(replaces.dataset.replace), JSON.parse(replaces.dataset.keeping));
  if (folds) setTimeout(() => fold(GIVEN.folds[folds.closest('.fold').id], folds.classList.contains('open')));
});
document.addEventListener('focusout', () => setTimeout(() => { const late = held; held = {}; show(late); }));
window.addEventListener('storage', () => Object.assign(memory, remembered())); // another window has kept something
window.addEventListener('pagehide', () => { if (resting) record('replaceState'); });
window.addEventListener('popstate', () => {
  clearTimeout(resting);
  resting = 0;
  document.activeElement?.blur(); // what was being typed is undone
  read();
  tell();
  number += 1;
  showTab();
  look();
});
read();
if (tab !== GIVEN.tabs[0]) showTab();
if (location.search) look(); else exact(question());
