// What a page needs to be used by keyboard and heard by screen reader.
addEventListener("load", async () => {
  await window.MathJax?.startup.promise
  // A reference is a link inside a picture that MathJax hides in favour of a text without the link: the other way round.
  for (const svg of document.querySelectorAll("mjx-container svg:has(a)")) {
    const text = svg.nextElementSibling
    text.setAttribute("aria-hidden", "true")
    svg.removeAttribute("aria-hidden")
    svg.removeAttribute("role")
    svg.querySelector("a").setAttribute("aria-label", `equation ${text.textContent}`)
  }
  // What scrolls can be reached by Tab, and so scrolled with the arrow keys.
  const boxes = document.querySelectorAll("pre, div.output.text_html, .table, .table-wrapper, figure.align-default")
  const observer = new ResizeObserver((entries) => {
    for (const {target: box} of entries) {
      box.tabIndex = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight ? 0 : -1
    }
  })
  for (const box of boxes) observer.observe(box)
})
