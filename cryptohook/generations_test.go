package cryptohook

import (
	"fmt"
	"testing"
)

func TestGenerationsAreBoundedByTheSizeOfWhatIsInThem(t *testing.T) {
	const most = 100
	g := newGenerations[string](most, func(text string) int { return len(text) })
	size := func() (sum int) {
		for _, generation := range []map[string]string{g.newer, g.older} {
			for _, text := range generation {
				sum += len(text)
			}
		}
		return sum
	}
	ten := "0123456789"
	g.keep("in use", ten)
	for i := range 40 {
		g.keep(fmt.Sprint(i), ten)
		g.keep(fmt.Sprint(i), ten) // in its own place: no larger
		if text, known := g.look("in use"); !known || text != ten {
			t.Fatalf("what is in use is forgotten after %d others", i+1)
		}
		if size() > 2*most {
			t.Fatalf("%d bytes are remembered", size())
		}
	}
	var left []int
	for i := range 40 {
		if _, known := g.newer[fmt.Sprint(i)]; known {
			left = append(left, i)
		} else if _, known = g.older[fmt.Sprint(i)]; known {
			left = append(left, i)
		}
	}
	// Nine fit into a generation beside the one that is in use: 27 to 35, and those after them.
	if len(left) != 13 || left[0] != 27 {
		t.Errorf("remembered are %v", left)
	}
	g.clear()
	if _, known := g.look("39"); known || size() > 0 {
		t.Error("what was cleared is remembered")
	}
}
