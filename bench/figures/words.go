package figures

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"
)

func compare(a, b Key) int {
	return cmp.Or(
		cmp.Compare(a.Work, b.Work), cmp.Compare(a.Stored, b.Stored), cmp.Compare(a.Quantity, b.Quantity),
		cmp.Compare(a.Store, b.Store), cmp.Compare(a.Side, b.Side),
	)
}

// rounded leaves four significant digits: more is noise.
func rounded(value float64) float64 {
	text := strconv.FormatFloat(value, 'g', 4, 64)
	value, _ = strconv.ParseFloat(text, 64)
	return value
}

// inWords writes a value with its unit, which the quantity's name ends with.
func inWords(quantity string, value float64) string {
	switch {
	case strings.HasPrefix(quantity, "us_") || strings.HasSuffix(quantity, "_us") || quantity == "cpu_us_each":
		return duration(value)
	case strings.HasSuffix(quantity, "_kib"):
		return fmt.Sprintf("%.1f MiB", value/1024)
	case strings.HasSuffix(quantity, "_per_s"):
		return fmt.Sprintf("%.0f a second", value)
	case value == math.Trunc(value):
		return strconv.FormatFloat(value, 'f', 0, 64)
	default:
		return strconv.FormatFloat(value, 'f', 2, 64)
	}
}

func duration(micros float64) string {
	switch {
	case micros >= 1e6:
		return fmt.Sprintf("%.2f s", micros/1e6)
	case micros >= 10_000:
		return fmt.Sprintf("%.1f ms", micros/1e3)
	default:
		return fmt.Sprintf("%.0f µs", micros)
	}
}

func ratioInWords(r Ratio) string {
	return fmt.Sprintf("%.2f (%.2f–%.2f)", r.Median, r.Least, r.Greatest)
}

// Words says what a run was made on, and with.
func (r *Run) Words() string {
	m := r.Machine
	words := fmt.Sprintf("Made on %s: %d × %s, %.0f GiB of memory, %s, %s, mautrix %s", r.Made.Format("2 January 2006"),
		m.Processors, m.Processor, float64(m.MemoryMiB)/1024, m.System, m.Go, m.Mautrix)
	if m.Reference != "" {
		words += ", " + m.Reference
	}
	return words + fmt.Sprintf("; medians of %d.", r.Rounds)
}
