package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/mattn/go-isatty"

	"sendertrust/e2e/people"
)

const (
	lineWidth = 100
	nameWidth = 10
)

// stage prints what happens, in colours if it is a terminal that people look at.
type stage struct {
	out      io.Writer
	coloured bool
}

func newStage(out *os.File) *stage {
	return &stage{out: out, coloured: isatty.IsTerminal(out.Fd()) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

// The escape codes of terminals (ECMA-48).
const (
	plain  = "0"
	bold   = "1"
	faint  = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	cyan   = "36"
)

func (s *stage) paint(colour, text string) string {
	if !s.coloured || colour == plain {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// note tells what is going on behind the scenes.
func (s *stage) note(text string) { fmt.Fprintln(s.out, s.paint(faint, text)) }

func (s *stage) title(text string) {
	fmt.Fprintf(s.out, "\n%s\n%s\n", s.paint(bold, text), strings.Repeat("─", utf8.RuneCountInString(text)))
}

// scene tells what the reader must know and the people in the room do not.
func (s *stage) scene(text string) {
	fmt.Fprintln(s.out)
	for _, line := range wrap(text, lineWidth-2) {
		fmt.Fprintln(s.out, s.paint(faint, "· "+line))
	}
}

func (s *stage) fact(name, value string) { fmt.Fprintf(s.out, "  %-*s  %s\n", nameWidth, name, value) }

func (s *stage) message(name, text string) { s.speech(name, cyan, plain, text) }

// answer shows what the bot says, in the colour of the shield that it gives.
func (s *stage) answer(name string, answer *people.Answer) {
	colour := map[string]string{"red": red, "grey": yellow}[answer.Annotation.Shield]
	if colour == "" {
		colour = green
	}
	s.speech(name, bold, colour, answer.Body)
	s.speech("", plain, faint, fmt.Sprintf("[code %s, shield %s]", answer.Annotation.Code, answer.Annotation.Shield))
}

// warning shows what the bot says by itself.
func (s *stage) warning(name string, warning people.Notice) { s.speech(name, bold, red, warning.Body) }

// speech prints a name, and beside it a text of several lines.
func (s *stage) speech(name, nameColour, textColour, text string) {
	label := name + strings.Repeat(" ", max(0, nameWidth-utf8.RuneCountInString(name)))
	for paragraph := range strings.SplitSeq(text, "\n") {
		for _, line := range wrap(paragraph, lineWidth-nameWidth-4) {
			fmt.Fprintf(s.out, "  %s  %s\n", s.paint(nameColour, label), s.paint(textColour, line))
			label = strings.Repeat(" ", nameWidth)
		}
	}
}

// wrap breaks a text into lines at its spaces.
func wrap(text string, width int) (lines []string) {
	line := ""
	for word := range strings.FieldsSeq(text) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines, line = append(lines, line), ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	return append(lines, line)
}
