package figures

import "fmt"

// tolerated is by how much a ratio may be worse than the one that is kept.
const tolerated = 1.2

// Check compares the hook's ratios to stock mautrix in this run with those of the run that is kept. It gives a line for each ratio that
// both have, and those that are worse by more than 20 %: in the median, and each round of it than every one that is kept. On a machine that
// does something else as well, the rounds of one run may differ by more.
func (r *Run) Check(kept *Run) (lines, worse []string) {
	for _, series := range r.Series {
		of := series.Key
		if of.Side != hook || of.Quantity != micros {
			continue
		}
		against := of
		against.Side = stock
		now, measured := r.Ratio(of, against)
		before, known := kept.Ratio(of, against)
		if !measured || !known {
			continue
		}
		line := fmt.Sprintf("%s on %s: %s of stock mautrix, kept %s", of.Work, of.Store, ratioInWords(now), ratioInWords(before))
		lines = append(lines, line)
		if now.Median > before.Median*tolerated && now.Least > before.Greatest {
			worse = append(worse, line)
		}
	}
	return lines, worse
}
