package disk

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
)

// sector is what a disk writes whole or not at all, in bytes.
const sector = 512

// Loss is what a loss of power did.
type Loss struct {
	// Unsynced are the pieces of sectors that were written and not synced, and Lost those of them that are gone.
	Unsynced, Lost int
}

// medium is what the log makes of a disk: what is durable, and what is on its way.
type medium struct {
	// entries counts those of the log so far.
	entries uint64
	files   map[uint32]*file
	// names are the directory's durable entries; naming are changes of it that were not synced, in their order.
	names  map[string]*file
	naming []naming
}

type file struct {
	durable []byte
	pending []change
}

// change is a write, or, without data, a truncation to that size; at is its place in the log.
type change struct {
	at, offset uint64
	data       []byte
}

// naming gives a name to a file, or takes it away.
type naming struct {
	at   uint64
	name string
	file *file
}

func newMedium(durable map[string][]byte) *medium {
	m := &medium{files: make(map[uint32]*file), names: make(map[string]*file)}
	for name, content := range durable {
		m.names[name] = &file{durable: slices.Clone(content)}
	}
	return m
}

func (m *medium) apply(e entry) error {
	m.entries++
	switch e.kind {
	case opened:
		f, known := m.names[string(e.data)]
		if !known {
			return fmt.Errorf("the log opens %s, which was not there", e.data)
		}
		m.files[e.file] = f
		return nil
	case created:
		f := new(file)
		m.files[e.file] = f
		m.naming = append(m.naming, naming{m.entries, string(e.data), f})
		return nil
	case unlinked:
		m.naming = append(m.naming, naming{m.entries, string(e.data), nil})
		return nil
	case syncedDir:
		done := countUntil(m.naming, func(n naming) bool { return n.at > e.offset })
		m.rename(m.names, m.naming[:done])
		m.naming = m.naming[done:]
		return nil
	}
	f := m.files[e.file]
	if f == nil {
		return fmt.Errorf("the log changes file %d, which it has not opened", e.file)
	}
	switch e.kind {
	case written:
		if len(e.data) > 0 {
			f.pending = append(f.pending, change{m.entries, e.offset, e.data})
		}
	case truncated:
		f.pending = append(f.pending, change{at: m.entries, offset: e.offset})
	case synced:
		done := countUntil(f.pending, func(c change) bool { return c.at > e.offset })
		for _, c := range f.pending[:done] {
			f.durable = c.on(f.durable, nil)
		}
		f.pending = f.pending[done:]
	default:
		return fmt.Errorf("the log has an entry of kind %d", e.kind)
	}
	return nil
}

// countUntil gives how many come before the first that is so.
func countUntil[T any](all []T, so func(T) bool) int {
	if at := slices.IndexFunc(all, so); at >= 0 {
		return at
	}
	return len(all)
}

func (m *medium) rename(names map[string]*file, changes []naming) {
	for _, change := range changes {
		if change.file == nil {
			delete(names, change.name)
		} else {
			names[change.name] = change.file
		}
	}
}

// on makes the change to a file's content, in place. What a write beyond its end leaves in between comes from fill: zeros without it.
func (c change) on(content []byte, fill func([]byte)) []byte {
	have, end := uint64(len(content)), c.offset+uint64(len(c.data))
	if c.data == nil && end < have {
		return content[:end]
	}
	if end > have {
		content = append(content, make([]byte, end-have)...)
		if fill != nil {
			fill(content[have:])
		}
	}
	copy(content[c.offset:], c.data)
	return content
}

// losePower gives what is left. A directory's changes survive in their order, as a journal has them; each sector of a file has some state
// that it has had since the last sync.
func (m *medium) losePower(seed uint64) (left map[string][]byte, loss Loss) {
	random := rand.New(rand.NewPCG(seed, sector))
	names := maps.Clone(m.names)
	m.rename(names, m.naming[:random.IntN(len(m.naming)+1)])
	left = make(map[string][]byte)
	for _, name := range slices.Sorted(maps.Keys(names)) {
		left[name] = names[name].torn(random, &loss)
	}
	return left, loss
}

// torn gives what is left of a file.
func (f *file) torn(random *rand.Rand, loss *Loss) []byte {
	pieces := f.pieces()
	// survive is how many of the writes to each sector came to the disk: the first ones.
	survive := make(map[uint64]int)
	for _, piece := range pieces {
		if piece.data != nil {
			survive[piece.offset/sector]++
		}
	}
	// What a drive has written by itself may be nothing, all, or anything in between.
	lucky, unlucky := random.IntN(6) == 0, random.IntN(6) == 0
	for _, at := range slices.Sorted(maps.Keys(survive)) {
		if unlucky {
			survive[at] = 0
		} else if !lucky {
			survive[at] = random.IntN(survive[at] + 1)
		}
	}
	// Space that a file has got, and whose data never came, holds zeros or whatever was there before.
	var fill func([]byte)
	if random.IntN(2) == 0 {
		fill = func(space []byte) {
			for i := range space {
				space[i] = byte(random.Uint32())
			}
		}
	}
	content := slices.Clone(f.durable)
	seen := make(map[uint64]int)
	for _, piece := range pieces {
		if piece.data == nil {
			if lucky || !unlucky && random.IntN(2) == 0 {
				content = piece.on(content, fill)
			}
			continue
		}
		loss.Unsynced++
		at := piece.offset / sector
		if seen[at]++; seen[at] > survive[at] {
			loss.Lost++
			continue
		}
		content = piece.on(content, fill)
	}
	return content
}

// pieces gives the pending changes, with the writes cut where sectors end.
func (f *file) pieces() (pieces []change) {
	for _, c := range f.pending {
		if c.data == nil {
			pieces = append(pieces, c)
			continue
		}
		for len(c.data) > 0 {
			size := min(sector-c.offset%sector, uint64(len(c.data)))
			pieces = append(pieces, change{offset: c.offset, data: c.data[:size]})
			c.offset, c.data = c.offset+size, c.data[size:]
		}
	}
	return pieces
}
