// Command plots draws the pictures of docs/performance.md from the figures that are kept: what receiving and judging cost against how many
// sessions are stored, and where the time goes.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// series is what this needs of a quantity in bench/committed.json.
type series struct {
	Side     string    `json:"side"`
	Store    string    `json:"store"`
	Work     string    `json:"work"`
	Stored   int       `json:"stored"`
	Quantity string    `json:"quantity"`
	Values   []float64 `json:"values"`
}

func main() {
	figures := flag.String("figures", "../committed.json", "the figures that are kept")
	profile := flag.String("profile", "", "a CPU profile of receiving")
	out := flag.String("out", "../../docs/pictures", "where the pictures go")
	flag.Parse()
	if err := draw(*figures, *profile, *out); err != nil {
		fmt.Fprintln(os.Stderr, "plots:", err)
		os.Exit(1)
	}
}

func draw(figures, profile, out string) error {
	text, err := os.ReadFile(figures)
	if err != nil {
		return err
	}
	var run struct {
		Series []series `json:"series"`
	}
	if err = json.Unmarshal(text, &run); err != nil {
		return fmt.Errorf("failed to read %s: %w", figures, err)
	}
	if err = drawCosts(run.Series, filepath.Join(out, "cost-by-sessions.svg")); err != nil || profile == "" {
		return err
	}
	shares, err := sharesOf(profile)
	if err != nil {
		return err
	}
	return drawShares(shares, filepath.Join(out, "where-time-goes.svg"))
}

const (
	width, height = 16 * vg.Centimeter, 9 * vg.Centimeter
)

// lines are those of the first picture.
var lines = []struct {
	side, work, words string
	colour            color.Color
	dashed            bool
}{
	{"hook", "receive_stored", "receive a room key", color.RGBA{0x1b, 0x6c, 0xa8, 0xff}, false},
	{"reference", "receive_stored", "the reference", color.RGBA{0x1b, 0x6c, 0xa8, 0xff}, true},
	{"hook", "decrypt_stored", "decrypt and judge a message", color.RGBA{0xc2, 0x4d, 0x2c, 0xff}, false},
	{"reference", "decrypt_stored", "the reference", color.RGBA{0xc2, 0x4d, 0x2c, 0xff}, true},
}

func drawCosts(all []series, file string) error {
	p := plot.New()
	p.Title.Text = "What it costs as the database grows"
	p.X.Label.Text, p.Y.Label.Text = "Megolm sessions stored", "µs each"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, sessionTicks
	p.Y.Min = 0
	p.Legend.Top, p.Legend.Left = true, true
	p.Add(plotter.NewGrid())
	highest := 0.0
	for _, l := range lines {
		var points plotter.XYs
		for _, s := range all {
			if s.Side == l.side && s.Work == l.work && s.Quantity == "us_each" && s.Stored > 0 {
				points = append(points, plotter.XY{X: float64(s.Stored), Y: median(s.Values)})
				highest = max(highest, median(s.Values))
			}
		}
		if len(points) == 0 {
			continue
		}
		slices.SortFunc(points, func(a, b plotter.XY) int { return int(a.X - b.X) })
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color, line.Width, dots.Color = l.colour, vg.Points(1.5), l.colour
		if l.dashed {
			line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
		}
		p.Add(line, dots)
		p.Legend.Add(l.words, line)
	}
	// Room for the legend.
	p.Y.Max = max(1, highest*1.6)
	return p.Save(width, height, file)
}

var sessionTicks = plot.ConstantTicks{
	{Value: 1000, Label: "1,000"}, {Value: 10_000, Label: "10,000"}, {Value: 100_000, Label: "100,000"}, {Value: 1_000_000, Label: "1,000,000"},
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

func drawShares(shares []share, file string) error {
	p := plot.New()
	p.Title.Text = "Where the time goes: receiving a room key, on SQLite"
	p.X.Label.Text = "% of the processor's time"
	values, names := make(plotter.Values, len(shares)), make([]string, len(shares))
	for i, s := range shares {
		// The greatest is to be on top.
		values[len(shares)-1-i], names[len(shares)-1-i] = s.percent, fmt.Sprintf("%s: %.0f %%", s.name, s.percent)
	}
	bars, err := plotter.NewBarChart(values, vg.Points(14))
	if err != nil {
		return err
	}
	bars.Horizontal, bars.Color, bars.LineStyle.Width = true, color.RGBA{0x1b, 0x6c, 0xa8, 0xff}, 0
	p.Add(bars)
	p.NominalY(names...)
	p.X.Min, p.X.Max = 0, 1.1*shares[0].percent
	return p.Save(width, height, file)
}
