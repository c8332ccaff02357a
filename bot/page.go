package bot

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode"

	"go.mau.fi/util/confusable"
	"golang.org/x/text/unicode/norm"
	"maunium.net/go/mautrix/id"
)

// What the longer answers are made of: lists, tables, and details for those who know what they mean.

// page is words below each other.
type page []words

func (p page) plain() string {
	said := make([]string, len(p))
	for i, w := range p {
		said[i] = w.plain()
	}
	return strings.Join(said, "\n\n")
}

func (p page) html() string {
	var written strings.Builder
	for _, w := range p {
		if _, block := w.(blockWords); block {
			written.WriteString(w.html())
		} else {
			written.WriteString("<p>" + w.html() + "</p>")
		}
	}
	return written.String()
}

// blockWords are words whose HTML is not part of a line.
type blockWords interface {
	words
	block()
}

// remark is a sentence of its own.
type remark string

func (r remark) plain() string { return string(r) }
func (r remark) html() string  { return escapeHTML(string(r)) }

// advice is what to do, at the end of an answer.
type advice string

func (a advice) plain() string { return string(a) }
func (a advice) html() string  { return "<em>" + escapeHTML(string(a)) + "</em>" }

// points is a list below a line; numbered, if its items follow from each other.
type points struct {
	above    string
	items    []string
	numbered bool
}

func (p points) block() {}

func (p points) plain() string {
	lines := bulleted(p.items)
	if p.numbered {
		for i, item := range p.items {
			lines[i] = fmt.Sprintf("%d. %s", i+1, item)
		}
	}
	if p.above != "" {
		lines = append([]string{p.above}, lines...)
	}
	return strings.Join(lines, "\n")
}

func (p points) html() string {
	var written strings.Builder
	if p.above != "" {
		written.WriteString("<p>" + escapeHTML(p.above) + "</p>")
	}
	list := "ul"
	if p.numbered {
		list = "ol"
	}
	written.WriteString("<" + list + ">")
	for _, item := range p.items {
		written.WriteString("<li>" + escapeHTML(item) + "</li>")
	}
	written.WriteString("</" + list + ">")
	return written.String()
}

// table has a head and rows, all of the same length. Clients without HTML get a line for each row.
type table struct {
	head []string
	rows [][]string
}

func (t table) block() {}

func (t table) plain() string {
	lines := make([]string, len(t.rows))
	for i, row := range t.rows {
		lines[i] = strings.Join(row, " · ")
	}
	return strings.Join(lines, "\n")
}

func (t table) html() string {
	var written strings.Builder
	written.WriteString("<table><thead>")
	writeRow(&written, "th", t.head)
	written.WriteString("</thead><tbody>")
	for _, row := range t.rows {
		writeRow(&written, "td", row)
	}
	written.WriteString("</tbody></table>")
	return written.String()
}

func writeRow(written *strings.Builder, cell string, row []string) {
	written.WriteString("<tr>")
	for _, text := range row {
		written.WriteString("<" + cell + ">" + escapeHTML(text) + "</" + cell + ">")
	}
	written.WriteString("</tr>")
}

// smallPrint is for those who know what it means. Most clients fold it up.
type smallPrint struct {
	title string
	lines []string
}

func (s smallPrint) block() {}

func (s smallPrint) plain() string { return s.title + "\n" + strings.Join(s.lines, "\n") }

func (s smallPrint) html() string {
	return "<details><summary>" + escapeHTML(s.title) + "</summary>" + escapeHTML(strings.Join(s.lines, "\n")) + "</details>"
}

// codeLine is what somebody is to type, as it is.
type codeLine string

func (c codeLine) block()        {}
func (c codeLine) plain() string { return string(c) }
func (c codeLine) html() string  { return "<pre><code>" + escapeHTML(string(c)) + "</code></pre>" }

// longestAnswer is how much of an event's 65,536 bytes an answer may take, as JSON: encryption makes it a third longer.
const longestAnswer = 32 * 1024

// roomForRest is what an answer's content has besides the words of its command: the verdict on the command, and its relation.
const roomForRest = 4 * 1024

// fits says that words are not too long for an answer.
func fits(w words) bool {
	content, err := json.Marshal(noticeContent(w, nil))
	return err == nil && len(content) <= longestAnswer-roomForRest
}

// atMost gives the words with as many of their items as fit.
func atMost(items int, say func(items int) words) words {
	for ; items > 0; items-- {
		if said := say(items); fits(said) {
			return said
		}
	}
	return say(0)
}

// moment words a time, to the minute; empty: nobody has noted it.
func moment(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return at.UTC().Format("2006-01-02 15:04 UTC")
}

// showKey writes a key in groups of four.
func showKey(key id.Ed25519) string { return groups(id.Ed25519(clipKey(key))) }

// clipKey writes a key as it is. What is too long to be one, or has letters that no key has, was never checked, and is cut.
func clipKey[Key ~string](key Key) string { return clipTo(showName(string(key)), 64) }

// lookOf is the same for names that people cannot tell apart: letters that look like others, capitals, and what cannot be seen do not count.
func lookOf(name string) string {
	name = strings.Map(func(c rune) rune {
		if unseen(c) || unicode.IsSpace(c) {
			return -1
		}
		return c
	}, norm.NFKC.String(clipTo(name, 2*longestName)))
	return confusable.Skeleton(strings.ToLower(confusable.Skeleton(strings.ToLower(name))))
}
