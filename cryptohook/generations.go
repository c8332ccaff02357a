package cryptohook

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

// generations remember values by their keys, in two generations of a bounded size. What was not asked for while one was filled is forgotten.
type generations[K comparable, V any] struct {
	mu           sync.Mutex
	newer, older map[K]V
	// size is that of the newer generation, and most the one from which on the next begins; sizeOf is the size of a value.
	size, most int
	sizeOf     func(V) int
}

func newGenerations[K comparable, V any](most int, sizeOf func(V) int) *generations[K, V] {
	return &generations[K, V]{most: most, sizeOf: sizeOf}
}

// each is the size of values that are all alike.
func each[V any](V) int { return 1 }

// look gives what is remembered.
func (g *generations[K, V]) look(key K) (value V, known bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if value, known = g.newer[key]; known {
		return value, true
	} else if value, known = g.older[key]; known {
		g.put(key, value)
	}
	return value, known
}

// keep remembers a value, in the place of another under the same key.
func (g *generations[K, V]) keep(key K, value V) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.put(key, value)
}

// put puts something into the newer generation. The caller holds mu.
func (g *generations[K, V]) put(key K, value V) {
	if former, there := g.newer[key]; there {
		g.size -= g.sizeOf(former)
	} else if g.size >= g.most || g.newer == nil {
		g.newer, g.older, g.size = make(map[K]V), g.newer, 0
	}
	g.newer[key] = value
	g.size += g.sizeOf(value)
}

func (g *generations[K, V]) clear() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.newer, g.older, g.size = nil, nil, 0
}

// digest is a hash of all that something depends on.
type digest [sha256.Size]byte

// hashOfParts hashes texts, each with its length before it.
func hashOfParts(parts ...string) digest {
	hash := sha256.New()
	for _, part := range parts {
		_ = binary.Write(hash, binary.BigEndian, uint64(len(part)))
		hash.Write([]byte(part))
	}
	return digest(hash.Sum(nil))
}

// digestsInGeneration is how many things are in a generation that are remembered by a digest: 33 bytes each.
const digestsInGeneration = 10_000

// digests are what was found out of things that never change.
type digests = generations[digest, bool]

func newDigests() *digests { return newGenerations[digest](digestsInGeneration, each[bool]) }
