package cryptohook

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

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

// remembered is what was found out of things that never change, by their digests: two generations of a bounded size. What was not asked for while
// one was filled is forgotten.
type remembered struct {
	mu           sync.Mutex
	newer, older map[digest]bool
}

// perGeneration is how many things are in a generation: 33 bytes each.
const perGeneration = 10_000

// look gives what was found out.
func (r *remembered) look(of digest) (found, known bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if found, known = r.newer[of]; known {
		return found, true
	}
	if found, known = r.older[of]; known {
		r.put(of, found)
	}
	return found, known
}

// has says that something is remembered as true.
func (r *remembered) has(of digest) bool {
	found, _ := r.look(of)
	return found
}

func (r *remembered) keep(of digest, found bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.put(of, found)
}

// put puts something into the newer generation. The caller holds mu.
func (r *remembered) put(of digest, found bool) {
	if len(r.newer) >= perGeneration || r.newer == nil {
		r.newer, r.older = make(map[digest]bool), r.newer
	}
	r.newer[of] = found
}

func (r *remembered) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.newer, r.older = nil, nil
}
