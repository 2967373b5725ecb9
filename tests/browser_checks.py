"""Checks of pages in a browser that tests of several pages share."""


def fits(tab):
    """Check that a page has no horizontal scroll bar."""
    width = tab.viewport_size["width"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page is wider than its window"


def faint(tab):
    """Return the texts with less contrast than WCAG 2.1 asks for (4.5:1), and their contrast."""
    return tab.evaluate("""() => {
        const pixel = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgba = (color) => {
            pixel.clearRect(0, 0, 1, 1);
            pixel.fillStyle = color;
            pixel.fillRect(0, 0, 1, 1);
            return [...pixel.getImageData(0, 0, 1, 1).data];
        };
        const over = (top, below) => below.map((value, i) => value + (top[i] - value) * top[3] / 255);
        const behind = (element) => {
            if (!element) return [255, 255, 255];
            const own = rgba(getComputedStyle(element).backgroundColor);
            return own[3] === 255 ? own.slice(0, 3) : over(own, behind(element.parentElement));
        };
        const linear = (value) => value <= 10 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4;
        const light = (rgb) => 0.2126 * linear(rgb[0]) + 0.7152 * linear(rgb[1]) + 0.0722 * linear(rgb[2]);
        // Finish colour transitions, since only their final colours count.
        document.getAnimations().filter(each => each instanceof CSSTransition).forEach(each => each.finish());
        const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
            if (!text || !element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
            const ground = behind(element), ink = over(rgba(getComputedStyle(element).color), ground);
            const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
            const ratio = (high + 0.05) / (low + 0.05);
            if (ratio < 4.5) found.push(`${text}: ${ratio.toFixed(2)}`);
        }
        return found;
    }""")
