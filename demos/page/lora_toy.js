// The LoRA tab's small matrices, which the reader can watch multiply. lora_widget.js, which follows this, has the settings.

const COLUMN = [2, -1, 3, 1, -2], ROW = [1, -2, 2, 3, -1]; // B and A of rank 1; each further rank rotates them
let toyRank = 1;
const toyB = (i, k) => COLUMN[(i + 2 * k) % 5] * (k % 2 ? -1 : 1), toyA = (k, j) => ROW[(j + k) % 5];
const toyTerms = (i, j) => Array.from({length: toyRank}, (_, k) => toyB(i, k) * toyA(k, j));
const toy = () => {
  const five = [0, 1, 2, 3, 4], ranks = Array.from({length: toyRank}, (_, k) => k);
  const largest = Math.max(...five.flatMap((i) => five.map((j) => Math.abs(sum(toyTerms(i, j))))));
  const number = (n) => String(n).replace('-', '−');
  const table = (name, label, rows, columns, cell) => `<table class="${name}" aria-label="${label}">` +
    rows.map((i) => `<tr>${columns.map((j) => cell(i, j)).join('')}</tr>`).join('') + '</table>';
  const productCell = (i, j) => {
    const n = sum(toyTerms(i, j)), share = (Math.abs(n) / largest).toFixed(3);
    return `<td data-i="${i}" data-j="${j}" tabindex="${i + j ? -1 : 0}">` +
      `<i style="--v:${share}" class="${n < 0 ? 'minus' : ''}"></i><span>${number(n)}</span></td>`;
  };
  $('.toy').innerHTML =
    table('toy-b', 'B', five, ranks, (i, k) => `<td data-i="${i}">${number(toyB(i, k))}</td>`) + '<span class="sign">×</span>' +
    table('toy-a', 'A', ranks, five, (k, j) => `<td data-j="${j}">${number(toyA(k, j))}</td>`) + '<span class="sign">=</span>' +
    table('toy-w', 'BA', five, five, productCell);
  stage.querySelectorAll('.toy-ranks button').forEach((b) => b.setAttribute('aria-pressed', +b.value === toyRank));
};
const toyFinding = (i, j) => {
  const scale = scaleOf(data, settings), number = (n) => n < 0 ? `(−${-n})` : n;
  if (i === undefined) {
    const many = 10 * toyRank;
    return put($('.toy-said'), fill(WORDS[many < 25 ? 'toy' : 'toy_past'], {rank: toyRank, numbers: bold(many, 'trained')}));
  }
  const terms = toyTerms(i, j), made = sum(terms);
  const said = terms.map((_, k) => `${number(toyB(i, k))} × ${number(toyA(k, j))}`).join(' + ');
  const scaled = significant(Math.abs(made * scale)) * Math.sign(made || 1);
  put($('.toy-said'), `Row ${i + 1} of B times column ${j + 1} of A: ${said} = ${bold(made, 'trained')}; ` +
    `in ΔW, times ${significant(scale)}: ${scaled}.`);
};
const light = (cell) => {
  const {i, j} = cell?.dataset ?? {};
  stage.querySelectorAll('.toy td').forEach((td) => {
    const isFactor = {'toy-b': td.dataset.i === i, 'toy-a': td.dataset.j === j}[td.closest('table').className];
    td.classList.toggle('lit', cell !== null && (isFactor ?? td === cell));
  });
  if (cell) toyFinding(+i, +j); else toyFinding();
};
