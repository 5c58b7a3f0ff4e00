// Code that is not the lesson is folded; one switch, which every page remembers, shows all of it.
const folds = document.querySelectorAll("article details.hide:has(> .cell_input):not(.tag_hide-cell > *)")
if (folds.length) {
  const button = document.createElement("button")
  const show = (on) => {
    for (const fold of folds) fold.open = on
    button.setAttribute("aria-pressed", on)
  }
  button.className = "show-code"
  button.textContent = "Show all code"
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") != "true"
    show(on)
    try { localStorage.setItem("show-code", on) } catch {}  // a reader may keep pages from storing anything
  })
  document.querySelector("article h1").after(button)
  let stored
  try { stored = localStorage.getItem("show-code") } catch {}
  show(stored == "true")
}

// What a term or a citation means, under the pointer and for the keyboard. It stays while the pointer is on it.
for (const link of document.querySelectorAll("article a.reference[href*='#']")) {
  const text = document.getElementById(`explains-${decodeURIComponent(link.hash.slice(1))}`)
  if (!text?.showPopover || text.contains(link)) continue
  let leaving
  const show = () => {
    clearTimeout(leaving)
    if (text.matches(":popover-open")) return
    text.showPopover()
    const box = link.getClientRects()[0]
    text.style.left = `${Math.max(8, Math.min(box.left, innerWidth - text.offsetWidth - 8)) + scrollX}px`
    text.style.top = `${(box.bottom + text.offsetHeight > innerHeight ? box.top - text.offsetHeight : box.bottom) + scrollY}px`
  }
  const hide = () => text.hidePopover()
  link.setAttribute("aria-describedby", text.id)
  for (const part of [link, text]) {
    part.addEventListener("pointerenter", (event) => event.pointerType == "mouse" && show())
    part.addEventListener("pointerleave", () => { leaving = setTimeout(hide, 200) })
  }
  link.addEventListener("focus", show)
  link.addEventListener("blur", hide)
  link.addEventListener("keydown", (event) => event.key == "Escape" && hide())
}

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
  // What scrolls can be reached by Tab, and so scrolled with the arrow keys; a shade says that there is more.
  const shade = (box) => box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 2)
  const observer = new ResizeObserver((entries) => {
    for (const {target: box} of entries) {
      box.tabIndex = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight ? 0 : -1
      shade(box)
    }
  })
  const boxes = "pre, div.output.text_html, .table, .table-wrapper, figure.align-default, div.math"
  for (const box of document.querySelectorAll(boxes)) {
    observer.observe(box)
    box.addEventListener("scroll", () => shade(box), {passive: true})
  }
})
