// Numbers in the page's words, as peftlab/units.py formats them. The scripts that count in the page begin with this.

const fill = (text, values) => text.replace(/{(\w+)}/g, (_, name) => values[name]);
const formats = {}; // kept, because to make one costs more than a hundred uses
const formatted = (n, digits = 0) => {
  formats[digits] ??= new Intl.NumberFormat('en-US', {maximumFractionDigits: digits});
  return formats[digits].format(n);
};
const whole = (n) => formatted(n);
const significant = (n) => {
  if (!n) return '0';
  const digits = 2 - Math.floor(Math.log10(Math.abs(n))), scale = 10 ** digits;
  return formatted(Math.round(n * scale) / scale, Math.max(0, digits));
};
const size = (n) => {
  for (const [unit, scale] of [['TB', 1e12], ['GB', 1e9], ['MB', 1e6], ['kB', 1e3]])
    if (n >= scale) return significant(n / scale) + ' ' + unit;
  return Math.round(n) + ' B';
};
const percent = (share) => significant(100 * share) + '%';
const bold = (text, meaning = '') => `<b class="${meaning}">${text}</b>`;
