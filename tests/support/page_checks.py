"""What a script finds wrong with a page in a browser: text that is cut off, small, faint, or over other text."""

from tests.support.browser import Browser

# Each fault is a sentence. Texts of closed details and hidden elements have no boxes and are passed over.
SCRIPT = r"""
const faults = [];
const add = (what, text) => faults.push(`${what}: ${text.trim().slice(0, 60)}`);
const root = document.documentElement;
const spare = root.clientWidth - root.scrollWidth;
if (spare < 0) add(`the page is ${-spare} px too wide`, location.href);

const scrolls = (node) => /auto|scroll/.test(getComputedStyle(node).overflowX);
const rgba = (text) => {
  const parts = text.match(/-?[\d.]+(?:e-?\d+)?/g).map(Number);
  const scale = text.startsWith('color(') ? 255 : 1;
  return [...parts.slice(0, 3).map((v) => v * scale), parts.length > 3 ? parts[3] : 1];
};
const over = (top, below) => top.slice(0, 3).map((v, k) => v * top[3] + below[k] * (1 - top[3]));
const behind = (node) => {
  const layers = [];
  for (let one = node; one; one = one.parentElement) {
    const colour = rgba(getComputedStyle(one).backgroundColor);
    if (colour[3] > 0) layers.push(colour);
    if (colour[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const light = (colour) => {
  const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const contrast = (a, b) => {
  const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, parent = text.parentElement;
  if (!text.data.trim() || parent.closest('script, style, title, option')) continue;
  const range = document.createRange();
  range.selectNodeContents(text);
  const boxes = [...range.getClientRects()].filter((b) => b.width > 0.5);
  if (!boxes.length) continue;
  const style = getComputedStyle(parent), drawn = parent.closest('svg');
  const scale = drawn ? parent.getScreenCTM().a : 1;
  if (parseFloat(style.fontSize) * scale < 11) add(`text of ${parseFloat(style.fontSize) * scale} px`, text.data);
  const colour = over(rgba(drawn ? style.fill : style.color), behind(parent));
  const ratio = contrast(colour, behind(parent));
  if (ratio < 4.5) add(`contrast ${ratio.toFixed(2)}`, text.data);
  let block = parent;
  while (!drawn && getComputedStyle(block).display.startsWith('inline')) block = block.parentElement;
  const home = (drawn || block).getBoundingClientRect();
  const scroller = (() => { for (let n = parent; n; n = n.parentElement) if (scrolls(n)) return n; return null; })();
  for (const box of boxes) {
    if (block !== scroller && (box.left < home.left - 1.5 || box.right > home.right + 1.5))
      add(`text leaves its box by ${Math.max(home.left - box.left, box.right - home.right).toFixed(1)} px`, text.data);
    if (drawn && (box.top < home.top - 1.5 || box.bottom > home.bottom + 1.5))
      add('text leaves its picture', text.data);
    if (!scroller && (box.left < -1 || box.right > root.clientWidth + 1)) add('text leaves the page', text.data);
    for (let n = parent; n && n !== document.body; n = n.parentElement) {
      const cut = getComputedStyle(n);
      if (!/hidden|clip/.test(cut.overflowX + cut.overflowY) || scrolls(n)) continue;
      const edge = n.getBoundingClientRect();
      const outside = [edge.left - box.left, box.right - edge.right, edge.top - box.top, box.bottom - edge.bottom];
      if (Math.max(...outside) > 1) add('text is cut off', text.data);
    }
  }
}
for (const svg of document.querySelectorAll('svg')) {
  const boxes = [...svg.querySelectorAll('text')].map((t) => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([name, a], k) => boxes.slice(k + 1).forEach(([other, b]) => {
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
      add('labels touch', `${name} and ${other}`);
  }));
  if (!svg.querySelector('title')) add('a picture without a title', svg.outerHTML);
}
return [...new Set(faults)].slice(0, 12);
"""


def faults(window: Browser) -> list[str]:
    """What is wrong with the page that is open; nothing if all is well."""
    return window.run(SCRIPT)
