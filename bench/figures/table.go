package figures

import (
	"fmt"
	"os"
	"strings"
)

// Table writes the rows that were measured, as Markdown.
func (r *Run) Table(goals []Goal) string {
	var table strings.Builder
	table.WriteString("| work | ours | against | theirs | ratio | goal | |\n|---|---|---|---|---|---|---|\n")
	for _, goal := range goals {
		if row, ok := r.row(goal); ok {
			fmt.Fprintf(&table, "| %s |\n", strings.Join(row, " | "))
		}
	}
	return table.String()
}

// Missing gives the rows for which something was not measured.
func (r *Run) Missing(goals []Goal) (works []string) {
	for _, goal := range goals {
		if _, ok := r.row(goal); !ok {
			works = append(works, goal.Work)
		}
	}
	return works
}

// row gives the cells of a goal. It says false if it was not measured.
func (r *Run) row(goal Goal) (cells []string, ok bool) {
	ours, ok := Median(r.Values(goal.Of))
	if !ok {
		return nil, false
	}
	cells = []string{goal.Work, inWords(goal.Of.Quantity, ours), goal.other(), "", "", "", ""}
	result := ours
	if goal.Against == nil {
		if goal.AtMost != 0 {
			cells[5] = "≤ " + inWords(goal.Of.Quantity, goal.AtMost)
		}
	} else {
		ratio, measured := r.Ratio(goal.Of, *goal.Against)
		if !measured {
			return nil, false
		}
		theirs, _ := Median(r.Values(*goal.Against))
		cells[3], cells[4] = inWords(goal.Against.Quantity, theirs), ratioInWords(ratio)
		result = ratio.Median
		if goal.AtMost != 0 {
			cells[5] = fmt.Sprintf("≤ %g", goal.AtMost)
		}
	}
	if goal.AtMost != 0 {
		cells[6] = map[bool]string{true: "✅", false: "❌"}[result <= goal.AtMost]
	}
	return cells, true
}

// Replace puts a text into a file, between the lines <!-- NAME --> and <!-- /NAME -->.
func Replace(file, name, text string) error {
	whole, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	begin, end := "<!-- "+name+" -->\n", "<!-- /"+name+" -->"
	before, rest, found := strings.Cut(string(whole), begin)
	_, after, alsoFound := strings.Cut(rest, end)
	if !found || !alsoFound {
		return fmt.Errorf("%s has no place for %s: it should be between the lines %q and %q", file, name, strings.TrimSpace(begin), end)
	}
	return os.WriteFile(file, []byte(before+begin+text+end+after), 0o644)
}
