package figures

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"time"
)

// Run is everything that one run of the benchmarks has measured.
type Run struct {
	Made    time.Time `json:"made"`
	Machine Machine   `json:"machine"`
	// Rounds is how many times each process was started, in turn with the others.
	Rounds int `json:"rounds"`
	// Series are the values of each quantity, one for each round.
	Series []Series `json:"series"`
}

// Machine is what the figures were made on, and with.
type Machine struct {
	Processor  string `json:"processor"`
	Processors int    `json:"processors"`
	MemoryMiB  int    `json:"memory_mib"`
	System     string `json:"system"`
	Go         string `json:"go"`
	Mautrix    string `json:"mautrix"`
	// Reference is empty when it was not there.
	Reference string `json:"reference,omitempty"`
}

// Key names a quantity: of what work, whose, where, and with how many sessions stored before.
type Key struct {
	Side   string `json:"side"`
	Store  string `json:"store"`
	Work   string `json:"work"`
	Stored int    `json:"stored,omitempty"`
	// Quantity is us_each, cpu_us_each, peak_kib, resident_kib, live_kib, or the name of another value.
	Quantity string `json:"quantity"`
}

// String gives the key's parts, for messages.
func (k Key) String() string {
	text := fmt.Sprintf("%s of %s on %s (%s)", k.Quantity, k.Work, k.Store, k.Side)
	if k.Stored > 0 {
		text += fmt.Sprintf(" with %d sessions stored", k.Stored)
	}
	return text
}

// Series is a quantity with its values, in the order of the rounds.
type Series struct {
	Key
	Values []float64 `json:"values"`
}

// Add notes the figures of one process.
func (r *Run) Add(measured []Figure) {
	for _, figure := range measured {
		for quantity, value := range figure.quantities() {
			r.add(Key{figure.Side, figure.Store, figure.Work, figure.Stored, quantity}, value)
		}
	}
}

func (f Figure) quantities() map[string]float64 {
	quantities := make(map[string]float64, len(f.Values))
	for name, value := range f.Values {
		quantities[name] = value
	}
	for name, value := range map[string]float64{
		"us_each": f.MicrosEach, "cpu_us_each": f.CPUMicrosEach,
		"peak_kib": float64(f.PeakKiB), "resident_kib": float64(f.ResidentKiB), "live_kib": float64(f.LiveKiB),
	} {
		if value != 0 {
			quantities[name] = value
		}
	}
	return quantities
}

func (r *Run) add(key Key, value float64) {
	for i := range r.Series {
		if r.Series[i].Key == key {
			r.Series[i].Values = append(r.Series[i].Values, value)
			return
		}
	}
	r.Series = append(r.Series, Series{key, []float64{value}})
}

// Replace puts the figures of another run in the place of those of the same works here. The other one's quantities are all that is left of
// them.
func (r *Run) Replace(other *Run) {
	work := func(key Key) Key {
		key.Quantity = ""
		return key
	}
	measured := make(map[Key]struct{})
	for _, series := range other.Series {
		measured[work(series.Key)] = struct{}{}
	}
	r.Series = slices.DeleteFunc(r.Series, func(series Series) bool { _, anew := measured[work(series.Key)]; return anew })
	r.Series = append(r.Series, other.Series...)
}

// Values gives what was measured in each round; nothing if it was not measured.
func (r *Run) Values(key Key) []float64 {
	for _, series := range r.Series {
		if series.Key == key {
			return series.Values
		}
	}
	return nil
}

// Median gives the middle value, or the mean of the two in the middle. It says false for none.
func Median(values []float64) (median float64, ok bool) {
	if len(values) == 0 {
		return 0, false
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle], true
	}
	return (sorted[middle-1] + sorted[middle]) / 2, true
}

// Ratio is one quantity against another: the ratio of the medians, and the least and the greatest ratio of one round. What is noisy for
// both in a round hardly moves those.
type Ratio struct{ Median, Least, Greatest float64 }

// Ratio gives the ratio of two quantities. It says false if one was not measured.
func (r *Run) Ratio(of, against Key) (ratio Ratio, ok bool) {
	ours, theirs := r.Values(of), r.Values(against)
	a, measured := Median(ours)
	b, alsoMeasured := Median(theirs)
	if !measured || !alsoMeasured || b == 0 {
		return Ratio{}, false
	}
	ratio = Ratio{a / b, a / b, a / b}
	for i := range min(len(ours), len(theirs)) {
		if theirs[i] != 0 {
			ratio.Least, ratio.Greatest = min(ratio.Least, ours[i]/theirs[i]), max(ratio.Greatest, ours[i]/theirs[i])
		}
	}
	return ratio, true
}

// Load reads a run that was kept.
func Load(file string) (*Run, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var run Run
	if err = json.Unmarshal(text, &run); err != nil {
		return nil, fmt.Errorf("failed to read %s: %w", file, err)
	}
	return &run, nil
}

// Save keeps a run: the series in the order of their names, one in a line, so that a change is easy to see.
func (r *Run) Save(file string) error {
	kept := *r
	kept.Series = slices.Clone(r.Series)
	slices.SortFunc(kept.Series, func(a, b Series) int { return compare(a.Key, b.Key) })
	head, err := json.MarshalIndent(struct {
		Made    time.Time `json:"made"`
		Machine Machine   `json:"machine"`
		Rounds  int       `json:"rounds"`
	}{kept.Made, kept.Machine, kept.Rounds}, "", "  ")
	if err != nil {
		return err
	}
	text := append(head[:len(head)-2], ",\n  \"series\": [\n"...)
	for i, series := range kept.Series {
		series.Values = slices.Clone(series.Values)
		for n, value := range series.Values {
			series.Values[n] = rounded(value)
		}
		line, err := json.Marshal(series)
		if err != nil {
			return err
		}
		text = append(append(text, "    "...), line...)
		if i < len(kept.Series)-1 {
			text = append(text, ',')
		}
		text = append(text, '\n')
	}
	return os.WriteFile(file, append(text, "  ]\n}\n"...), 0o644)
}
