// Charts. Unlike gr.Plot, this puts the title into the page, where it can wrap, keeps the zoom, does not flicker, and follows
// the reader's theme.

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
