// The LoRA tab's small matrices, which one can watch multiply. lora_widget.js, which follows this, tells them what is set.

const COLUMN = [2, -1, 3, 1, -2], ROW = [1, -2, 2, 3, -1]; // of the first rank; further ranks rotate them
let toyRank = 1;
const toyB = (i, k) => COLUMN[(i + 2 * k) % 5] * (k % 2 ? -1 : 1), toyA = (k, j) => ROW[(j + k) % 5];
const toyTerms = (i, j) => Array.from({length: toyRank}, (_, k) => toyB(i, k) * toyA(k, j));
const toy = () => {
  const five = [0, 1, 2, 3, 4], ranks = Array.from({length: toyRank}, (_, k) => k);
  const largest = Math.max(...five.flatMap((i) => five.map((j) => Math.abs(sum(toyTerms(i, j))))));
  const number = (n) => String(n).replace('-', '−');
  const table = (name, label, rows) => `<table class="${name}" aria-label="${label}">${rows.map((cells) => `<tr>${cells.join('')}</tr>`).join('')}</table>`;
  $('.toy').innerHTML = table('toy-b', 'B', five.map((i) => ranks.map((k) => `<td data-i="${i}">${number(toyB(i, k))}</td>`))) +
    '<span class="sign">×</span>' + table('toy-a', 'A', ranks.map((k) => five.map((j) => `<td data-j="${j}">${number(toyA(k, j))}</td>`))) +
    '<span class="sign">=</span>' + table('toy-w', 'BA', five.map((i) => five.map((j) => {
      const n = sum(toyTerms(i, j));
      return `<td data-i="${i}" data-j="${j}" tabindex="${i + j ? -1 : 0}"><i style="--v:${(Math.abs(n) / largest).toFixed(3)}" class="${n < 0 ? 'minus' : ''}"></i><span>${number(n)}</span></td>`;
    })));
  stage.querySelectorAll('.toy-ranks button').forEach((b) => b.setAttribute('aria-pressed', +b.value === toyRank));
};
const toyFinding = (i, j) => {
  const scale = scaleOf(data, settings), number = (n) => n < 0 ? `(−${-n})` : n;
  if (i === undefined) {
    const many = 10 * toyRank;
    put($('.toy-said'), fill(WORDS[many < 25 ? 'toy' : 'toy_past'], {rank: toyRank, numbers: bold(many, 'trained')}));
    return;
  }
  const terms = toyTerms(i, j), made = sum(terms);
  const said = terms.map((_, k) => `${number(toyB(i, k))} × ${number(toyA(k, j))}`).join(' + ');
  put($('.toy-said'), `Row ${i + 1} of B times column ${j + 1} of A: ${said} = ${bold(made, 'trained')}; in ΔW, times ${significant(scale)}: ${significant(Math.abs(made * scale)) * Math.sign(made || 1)}.`);
};
const light = (cell) => {
  const {i, j} = cell?.dataset ?? {};
  stage.querySelectorAll('.toy td').forEach((td) => {
    const of = td.closest('table').className;
    td.classList.toggle('lit', cell !== null && (of === 'toy-b' ? td.dataset.i === i : of === 'toy-a' ? td.dataset.j === j : td === cell));
  });
  if (cell) toyFinding(+i, +j); else toyFinding();
};
