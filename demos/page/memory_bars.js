// Draws the Memory tab's sentence and bars from polynomials in batch, length and rank. words.js stands before this.

let at = props.value.at;
const evaluate = (terms) => terms.reduce((sum, [c, i, j, k]) => sum + c * at[0] ** i * at[1] ** j * at[2] ** k, 0);
const add = (kinds) => Object.values(kinds).reduce((a, b) => a + b, 0);
const isExact = (run) => run.exact && at.every((n, i) => n === props.value.at[i] || (i === 2 && !props.value.ranked));
const parts = (run) => {
  if (isExact(run)) return run.exact;
  if (!run.form) return run.states;
  const moments = run.form.moments.map((kinds) =>
    Object.fromEntries(Object.entries(kinds).map(([kind, terms]) => [kind, Math.max(0, evaluate(terms))])));
  const peak = moments.reduce((a, b) => add(b) > add(a) ? b : a);
  return {...peak, reserve: (run.form.reserve - 1) * add(peak), context: run.form.context};
};
const draw = () => {
  const {runs, gpus, alone, kinds} = props.value;
  const words = runs.some((run) => !run.form && !isExact(run)) ? {...props.value.words, ...alone} : props.value.words;
  const each = runs.map(parts), totals = each.map(add), most = Math.max(...totals);
  const last = totals.length - 1, needed = totals[last];
  const gpu = gpus.find(([, bytes]) => needed <= bytes), largest = gpus[gpus.length - 1];
  const where = gpu ? fill(words.one, {...words, gpu: gpu[0]})
    : fill(words.several, {...words, n: Math.ceil(needed / largest[1]).toLocaleString('en-US'), gpu: largest[0]});
  const room = element.querySelector('.bars').clientWidth;
  const ratio = totals[0] / needed, sure = runs.every((run) => !run.form || isExact(run)), about = sure ? '' : 'about ';
  const begin = fill(words.full, {model: bold(props.value.model), full: about + bold(size(totals[0]))});
  const name = (run) => run.name.replace('{rank}', at[2]);
  element.querySelector('.sentence').classList.toggle('estimated', !sure);
  element.querySelector('.sentence').innerHTML = begin + (last ? ' ' + fill(words.chosen, {
    method: bold(name(runs[last]), 'trained'), chosen: about + bold(size(needed), 'trained'),
    ratio: about + significant(Math.max(ratio, 1 / ratio)), less: ratio >= 1 ? 'less' : 'more',
    where: sure ? ', and ' + where : '',
  }) : sure ? ' ' + where[0].toUpperCase() + where.slice(1) + '.' : '');
  element.querySelector('.bars').innerHTML = runs.map((run, i) => {
    const mine = kinds.filter(([kind]) => each[i][kind] > 0);
    const pieces = mine.map(([kind, colour, label]) => {
      const share = 100 * each[i][kind] / most;
      return `<span class="piece ${colour}" style="width:${share}%" title="${label}: ${size(each[i][kind])}">` +
        (share * room / 100 > 9 * label.length + 14 ? `<i>${label}</i>` : '') + '</span>';
    }).join('');
    const said = mine.map(([kind, , label]) => `${label} ${size(each[i][kind])}`);
    return `<div class="bar"><div class="bar-name">${name(run)} <small>${run.note}</small><b>${size(totals[i])}</b></div>` +
      `<div class="pieces" role="img" aria-label="${name(run)}: ${said.join(', ')}">${pieces}</div></div>`;
  }).join('');
  const shown = new Map(kinds.filter(([kind]) => each.some((p) => p[kind] > 0)).map(([, colour, label]) => [colour, label]));
  element.querySelector('.legends').innerHTML = [...shown].map(([colour, label]) =>
    `<span class="legend"><span class="key ${colour}"></span>${colour === 'overhead' ? 'overhead' : label}</span>`).join('');
  element.querySelector('.source').innerHTML = runs.every(isExact) ? props.value.exact : props.value.closed;
};
draw();
watch('value', () => {
  if (!props.value.moved) at = props.value.at;
  draw();
});
new ResizeObserver(draw).observe(element);
window.addEventListener('peftlab-written', ({detail}) => {
  if (!Object.keys(detail).every((name) => SLIDERS.includes(name))) return; // the answer draws any other change
  at = SLIDERS.map((name, i) => +detail[name] || at[i]);
  if (!props.value.moved) {
    props.value = {...props.value, moved: true}; // so that Gradio shows an answer that equals the last one: it is a change
    peftlab.redrawn('memory.bars');
  }
  draw();
});
