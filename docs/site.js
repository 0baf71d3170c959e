// Code and tables that are wider than their place can be scrolled with the keyboard, also where nothing hovers: there the theme
// takes code out of the order of tabs. Both are put into place by its own script, some of them later.
{
  const reach = () => {
    for (const block of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
      if (block.scrollWidth > block.clientWidth && !block.hasAttribute("tabindex")) block.tabIndex = 0;
    }
  };
  reach();
  new MutationObserver(reach).observe(document.body, { attributeFilter: ["tabindex"], childList: true, subtree: true });
  addEventListener("resize", reach);
}
