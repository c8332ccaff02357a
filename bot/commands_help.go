package bot

import (
	"context"
	"slices"
	"strings"
)

// longestOperators is how much room the names of the operators get, in characters.
const longestOperators = 500

// orderHelp lists what the bot can be told. What is for its operators is listed for them only.
func (b *Bot) orderHelp(_ context.Context, o *order) response {
	everybodys, operators := b.manuals(o.speech)
	said := page{o.speech.text(signPlain, "help.everybody", nil), everybodys}
	switch {
	case slices.Contains(b.config.Trust.Operators, o.evt.Sender):
		said = append(said, remark(o.speech.phrase("help.operators", nil)), operators)
	case len(b.config.Trust.Operators) == 0:
		said = append(said, remark(o.speech.phrase("help.no_operators", nil)))
	default:
		said = append(said, remark(o.speech.phrase("help.others", vars{"Operators": clipTo(b.describeOperators(), longestOperators)})))
	}
	return response{words: said}
}

// manuals are the lists of commands for everybody and for operators.
func (b *Bot) manuals(s speech) (everybodys, operators manual) {
	for _, c := range commandList() {
		entry := manualEntry{example: s.phrase("help."+c.name+".example", nil), line: s.phrase("help."+c.name+".line", nil)}
		if c.operators {
			operators = append(operators, entry)
		} else {
			everybodys = append(everybodys, entry)
		}
	}
	return everybodys, operators
}

// manual is a list of commands.
type manual []manualEntry

// manualEntry is what is typed, and what comes of it.
type manualEntry struct{ example, line string }

func (m manual) block() {}

func (m manual) plain() string {
	lines := make([]string, len(m))
	for i, entry := range m {
		lines[i] = "• " + entry.example + " – " + entry.line
	}
	return strings.Join(lines, "\n")
}

func (m manual) html() string {
	var written strings.Builder
	written.WriteString("<ul>")
	for _, entry := range m {
		written.WriteString("<li><code>" + escapeHTML(entry.example) + "</code> – " + escapeHTML(entry.line) + "</li>")
	}
	written.WriteString("</ul>")
	return written.String()
}
