package secrets

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Hit is a place where a secret stands. It does not hold the secret.
type Hit struct {
	File string
	Line int // from 1
	Kind Kind
	// What says whose secret it is.
	What string
	// Form says how it is written.
	Form string
}

func (h Hit) String() string {
	return fmt.Sprintf("%s:%d: the %s of %s (%s)", h.File, h.Line, h.Kind, h.What, h.Form)
}

const (
	chunkBytes = 1 << 20
	// overlap is more than anything that is looked for is long, so that it is whole in one chunk or the next.
	overlap = 1 << 10
	// MostHits is how many hits of a file are told: what writes bodies into a log does it on every line.
	MostHits = 1000
)

// ScanFolder scans all *.log files in and below a folder.
func (s *Set) ScanFolder(folder string) (hits []Hit, err error) {
	err = filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(path, ".log") {
			return err
		}
		more, err := s.ScanFile(path)
		hits = append(hits, more...)
		return err
	})
	return hits, err
}

// ScanFile gives the places of a file where secrets stand, in order: one for each secret and line, and at most [MostHits].
func (s *Set) ScanFile(path string) ([]Hit, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return s.Scan(file, path)
}

// ScanText is [Set.ScanFile] for a text.
func (s *Set) ScanText(name, text string) []Hit {
	hits, _ := s.Scan(strings.NewReader(text), name) // a string can be read
	return hits
}

// Scan is [Set.ScanFile] for what a reader gives. Its memory does not grow with it.
func (s *Set) Scan(from io.Reader, name string) (hits []Hit, err error) {
	s.prepare()
	buffer := make([]byte, 0, chunkBytes+overlap)
	line := 1
	var told map[found]bool
	toldOn := 0
	for {
		filled, err := io.ReadFull(from, buffer[len(buffer):cap(buffer)])
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !last {
			return hits, fmt.Errorf("failed to read %s: %w", name, err)
		}
		buffer = buffer[:len(buffer)+filled]
		// What begins in the overlap is looked at with the next chunk.
		mine := len(buffer)
		if !last {
			mine -= overlap
		}
		places := s.scanChunk(buffer, mine)
		counted := 0
		for _, place := range places {
			line += bytes.Count(buffer[counted:place.at], []byte{'\n'})
			counted = place.at
			if toldOn != line {
				told, toldOn = map[found]bool{}, line
			}
			if told[place.found] {
				continue
			}
			told[place.found] = true
			if hits = append(hits, s.hit(name, line, place)); len(hits) == MostHits {
				return hits, nil
			}
		}
		if last {
			return hits, nil
		}
		line += bytes.Count(buffer[counted:mine], []byte{'\n'})
		buffer = buffer[:copy(buffer, buffer[mine:])]
	}
}

func (s *Set) hit(name string, line int, place place) Hit {
	if place.form == byItsLooks {
		is := looks[place.secret]
		return Hit{File: name, Line: line, Kind: is.kind, What: is.what, Form: string(byItsLooks)}
	}
	is := s.secrets[place.secret]
	return Hit{File: name, Line: line, Kind: is.kind, What: is.what, Form: string(place.form)}
}

// place is where in a chunk something begins.
type place struct {
	found
	at int
}

// scanChunk gives what begins in the first bytes of a chunk, in order.
func (s *Set) scanChunk(chunk []byte, mine int) (places []place) {
	var last, normal uint64 // the last eight bytes, as they are and in one alphabet
	run := 0                // how many characters of base64 there are up to here
	for i, c := range chunk {
		last = last<<8 | uint64(c)
		if s.textFilter.has(last) {
			places = s.findTexts(places, chunk, i+1, last)
		}
		plain := alphabet[c]
		if plain == 0 {
			run = 0
			continue
		}
		normal = normal<<8 | uint64(plain)
		if run++; run >= pieceBytes && s.pieceFilter.has(normal) {
			places = s.findPiece(places, chunk, i+1)
		}
	}
	places = s.findNumbers(places, chunk)
	places = findLooks(places, chunk)
	places = slices.DeleteFunc(places, func(p place) bool { return p.at >= mine })
	slices.SortStableFunc(places, func(a, b place) int { return a.at - b.at })
	return places
}

func (s *Set) findTexts(places []place, chunk []byte, end int, anchor uint64) []place {
	for _, text := range s.texts[anchor] {
		if begin := end - len(text.bytes); begin >= 0 && string(chunk[begin:end]) == text.bytes {
			places = append(places, place{text.found, begin})
		}
	}
	return places
}

func (s *Set) findPiece(places []place, chunk []byte, end int) []place {
	var part piece
	for i := range part {
		part[i] = alphabet[chunk[end-pieceBytes+i]]
	}
	if is, ok := s.pieces[part]; ok {
		places = append(places, place{is, end - pieceBytes})
	}
	return places
}

// findNumbers looks at lists of bytes, as Go ([1 2 3]) and JSON ([1,2,3]) write them.
func (s *Set) findNumbers(places []place, chunk []byte) []place {
	for from := 0; ; {
		open := bytes.IndexByte(chunk[from:], '[')
		if open < 0 {
			return places
		}
		from += open + 1
		for list, at := byteList(chunk[from:]), 0; len(list)-at >= numberBytes; at++ {
			if is, ok := s.numbers[number(list[at:])]; ok {
				places = append(places, place{is, from})
			}
		}
	}
}

// mostNumbers is longer than any list that holds one key.
const mostNumbers = 160

// byteList reads numbers from 0 to 255 with spaces or commas between them, until something else comes.
func byteList(written []byte) (list []byte) {
	value, digits := 0, 0
	for _, c := range written {
		switch {
		case c >= '0' && c <= '9' && digits < 3:
			value, digits = value*10+int(c-'0'), digits+1
			continue
		case digits > 0 && value <= 255:
			list = append(list, byte(value))
		case digits > 0:
			return list
		}
		if value, digits = 0, 0; c != ' ' && c != ',' || len(list) == mostNumbers {
			break
		}
	}
	return list
}

// look is what a secret that nobody knows looks like.
type look struct {
	secret
	prefix  string
	pattern *regexp.Regexp
}

var looks = []look{
	{secret{AccessToken, "somebody"}, "syt_", regexp.MustCompile(`^syt_[\w-]+_[A-Za-z]{20}_[0-9A-Za-z]{6}`)}, // as Synapse makes them
	{secret{AccessToken, "somebody"}, "Bearer ", regexp.MustCompile(`^Bearer [\w.~+/-]{16}`)},
	{secret{AccessToken, "somebody"}, "access_token", regexp.MustCompile(`^access_token(=|\\?": ?\\?")[\w.~+/-]{4}`)},
	// A session key or an exported session: a version, an index that is not large, the ratchet and a public key.
	{secret{MegolmSession, "somebody"}, "AgAA", regexp.MustCompile(`^AgAA[\w+/-]{212}`)},
	{secret{MegolmSession, "somebody"}, "AQAA", regexp.MustCompile(`^AQAA[\w+/-]{212}`)},
}

func findLooks(places []place, chunk []byte) []place {
	for number, look := range looks {
		for from := 0; ; {
			at := bytes.Index(chunk[from:], []byte(look.prefix))
			if at < 0 {
				break
			}
			begin := from + at
			from = begin + len(look.prefix)
			if (begin == 0 || alphabet[chunk[begin-1]] == 0) && look.pattern.Match(chunk[begin:min(len(chunk), begin+overlap)]) {
				places = append(places, place{found{int32(number), byItsLooks}, begin})
			}
		}
	}
	return places
}

// alphabet maps both alphabets of base64 to the standard one, and everything else to zero.
var alphabet = func() (to [256]byte) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") {
		to[c] = c
	}
	to['-'], to['_'] = '+', '/'
	return to
}()

func anchorOf(value string) uint64 {
	return binary.BigEndian.Uint64([]byte(value[len(value)-anchorBytes:]))
}

// prepare makes the filters.
func (s *Set) prepare() {
	s.preparing.Lock()
	defer s.preparing.Unlock()
	if s.textFilter != nil {
		return
	}
	texts, pieces := newFilter(len(s.texts)), newFilter(len(s.pieces))
	for anchor := range s.texts {
		texts.add(anchor)
	}
	for part := range s.pieces {
		pieces.add(binary.BigEndian.Uint64(part[pieceBytes-anchorBytes:]))
	}
	s.textFilter, s.pieceFilter = texts, pieces
}

// filter says of most numbers that are not in it that they are not, in one look.
type filter []uint64

// newFilter makes a filter of which at most one bit in 32 is set. Its length is a power of two.
func newFilter(count int) filter { return make(filter, max(8, 1<<bits.Len(uint(count/2)))) }

func (f filter) bit(value uint64) (word, mask uint64) {
	hash := value * 0x9e3779b97f4a7c15 // Fibonacci hashing: the upper bits are well mixed
	return hash >> (bits.LeadingZeros64(uint64(len(f)) - 1)), 1 << (hash >> 20 & 63)
}

func (f filter) add(value uint64) {
	word, mask := f.bit(value)
	f[word] |= mask
}

func (f filter) has(value uint64) bool {
	word, mask := f.bit(value)
	return f[word]&mask != 0
}
