package secrets

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/rs/zerolog"
)

// Kind says what a secret is.
type Kind string

// The kinds of secrets.
const (
	Password         Kind = "password"
	RecoveryKey      Kind = "recovery key"
	PickleKey        Kind = "pickle key"
	AccessToken      Kind = "access token"
	DatabasePassword Kind = "database password"
	DeviceKey        Kind = "device's private key"
	OneTimeKey       Kind = "one-time key"
	OlmSession       Kind = "Olm session key"
	MegolmSession    Kind = "Megolm session key"
	StoredSecret     Kind = "cross-signing or backup key" // and whatever else mautrix keeps under a secret's name
	FileKey          Kind = "key of an encrypted file"
	Body             Kind = "message body"
)

// Set is a set of secrets to look for. Several goroutines may scan with it, while nothing is added.
type Set struct {
	secrets []secret
	// texts are to be found as they are, by their last bytes.
	texts map[uint64][]text
	// pieces are parts of raw keys in base64 (with the alphabet's + and /) and in hexadecimal digits.
	pieces map[piece]found
	// numbers are the first bytes of parts of raw keys.
	numbers map[number]found

	// The filters are nil until something is scanned.
	textFilter, pieceFilter filter
	preparing               sync.Mutex
}

type secret struct {
	kind Kind
	what string
}

// found is which secret has been found, and how it was written.
type found struct {
	secret int32
	form   form
}

type form string

const (
	asItIs      form = "as it is"
	escaped     form = "escaped"
	inBase64    form = "base64"
	inHex       form = "hexadecimal"
	asNumbers   form = "as numbers"
	asRawBytes  form = "raw bytes"
	byItsLooks  form = "by its looks"
	anchorBytes      = 8  // how many bytes of something are looked up first
	pieceBytes       = 20 // characters of a key in base64 (15 bytes) or hexadecimal digits (10 bytes)
	blockBytes       = 32 // the part of a key of which the beginning is looked for; most keys have 32 bytes
	numberBytes      = 16 // how many decimal numbers are looked up
	mostText         = 256
)

type (
	piece  = [pieceBytes]byte
	number = [numberBytes]byte
	text   struct {
		found
		bytes string
	}
)

// ErrTooShort says that something cannot be told from other words.
var ErrTooShort = errors.New("too short to be looked for: it would be found in other words too")

// NewSet makes a set without secrets.
func NewSet() *Set {
	return &Set{texts: map[uint64][]text{}, pieces: map[piece]found{}, numbers: map[number]found{}}
}

// Len is how many secrets there are to look for.
func (s *Set) Len() int { return len(s.secrets) }

// Count is how many secrets there are of a kind.
func (s *Set) Count(kind Kind) (count int) {
	for _, secret := range s.secrets {
		if secret.kind == kind {
			count++
		}
	}
	return count
}

// AddText adds a text of at least 8 bytes, of which the first 256 are looked for. What says whose it is, for the report. An empty text is
// no secret.
func (s *Set) AddText(kind Kind, what, value string) error {
	if value == "" {
		return nil
	}
	if len(value) < anchorBytes {
		return fmt.Errorf("%s of %s: %w", kind, what, ErrTooShort)
	}
	if s.knowsText(value) {
		return nil
	}
	name := s.name(kind, what)
	if kind == RecoveryKey {
		s.addForms(name, strings.ReplaceAll(value, " ", ""))
	}
	s.addForms(name, value)
	s.addPieces(name, []byte(value))
	return nil
}

// addForms adds a text as it is, and as it is written in other places.
func (s *Set) addForms(name int32, value string) {
	value = value[:min(len(value), mostText)]
	s.addText(found{name, asItIs}, value)
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetEscapeHTML(false)
	_ = encoder.Encode(value) // a string, into memory
	withHTML, _ := json.Marshal(value)
	for _, other := range []string{
		strings.Trim(plain.String(), "\"\n"), strings.Trim(string(withHTML), `"`), strings.Trim(strconv.Quote(value), `"`),
		url.QueryEscape(value), url.PathEscape(value),
	} {
		s.addText(found{name, escaped}, other)
	}
}

// AddKey adds a raw key of at least 16 bytes.
func (s *Set) AddKey(kind Kind, what string, key []byte) error {
	if len(key) < numberBytes {
		return fmt.Errorf("%s of %s: %w", kind, what, ErrTooShort)
	}
	name := s.name(kind, what)
	s.addPieces(name, key)
	s.addRaw(name, key)
	return nil
}

// AddBase64 is AddKey for a key in base64 of whatever alphabet, padded or not.
func (s *Set) AddBase64(kind Kind, what, key string) error {
	raw, err := decode(key)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", kind, what, err)
	}
	return s.AddKey(kind, what, raw)
}

// AddSessionKey adds a Megolm session, by the session_key of an m.room_key or by what it is exported as.
func (s *Set) AddSessionKey(what, sessionKey string) error {
	raw, err := decode(sessionKey)
	if err != nil {
		return fmt.Errorf("%s of %s: %w", MegolmSession, what, err)
	}
	// A version, the index, the ratchet, the public key (which is the session's ID, and no secret), and perhaps a signature.
	// https://gitlab.matrix.org/matrix-org/olm/-/blob/master/docs/megolm.md#session-sharing-format
	const head, ratchet = 1 + 4, 4 * 32
	if len(raw) < head+ratchet {
		return fmt.Errorf("%s of %s: %w", MegolmSession, what, ErrTooShort)
	}
	s.addPieces(s.name(MegolmSession, what), raw[head:head+ratchet])
	return nil
}

func decode(key string) ([]byte, error) {
	raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.NewReplacer("-", "+", "_", "/").Replace(key), "="))
	if err != nil {
		return nil, errors.New("it is not base64") // without its text
	}
	return raw, nil
}

func (s *Set) name(kind Kind, what string) int32 {
	s.textFilter, s.pieceFilter = nil, nil // to be made anew
	s.secrets = append(s.secrets, secret{kind, what})
	return int32(len(s.secrets) - 1)
}

func (s *Set) addText(is found, value string) {
	if value = value[:min(len(value), mostText)]; len(value) < anchorBytes {
		return
	}
	if !s.knowsText(value) {
		s.texts[anchorOf(value)] = append(s.texts[anchorOf(value)], text{is, value})
	}
}

func (s *Set) knowsText(value string) bool {
	value = value[:min(len(value), mostText)]
	return slices.ContainsFunc(s.texts[anchorOf(value)], func(known text) bool { return known.bytes == value })
}

// knowsKey reports whether all blocks of a key are known. A Megolm ratchet mostly changes in its last one.
func (s *Set) knowsKey(key []byte) bool {
	for block := range slices.Chunk(key, blockBytes) {
		if len(block) >= numberBytes && !has(s.numbers, number(block)) {
			return false
		}
	}
	return true
}

// addPieces adds the beginnings of all blocks of a key, wherever in a run of base64 they stand.
func (s *Set) addPieces(name int32, key []byte) {
	for block := range slices.Chunk(key, blockBytes) {
		if len(block) < numberBytes {
			return
		}
		for before := range 3 {
			// What the bytes before the key, and the first bits of it, are in base64 depends on both.
			encoded := base64.RawStdEncoding.EncodeToString(append(make([]byte, before), block...))
			s.addPiece(found{name, inBase64}, encoded[[]int{0, 2, 3}[before]:])
		}
		s.addPiece(found{name, inHex}, hex.EncodeToString(block))
		s.addPiece(found{name, inHex}, strings.ToUpper(hex.EncodeToString(block)))
		if _, known := s.numbers[number(block)]; !known {
			s.numbers[number(block)] = found{name, asNumbers}
		}
	}
}

func (s *Set) addPiece(is found, encoded string) {
	if len(encoded) < pieceBytes {
		return
	}
	if part := piece([]byte(encoded)); !has(s.pieces, part) {
		s.pieces[part] = is
	}
}

func has[K comparable, V any](of map[K]V, key K) bool {
	_, ok := of[key]
	return ok
}

// addRaw adds a key as the bytes that it is, and as zerolog's Bytes and Go's %q write those. There are more keys of sessions than it
// would be quick to do this for, and sessions hand out theirs in base64.
func (s *Set) addRaw(name int32, key []byte) {
	var line bytes.Buffer
	logger := zerolog.New(&line)
	logger.Log().Bytes("", key).Send()
	written := strings.TrimSuffix(strings.TrimPrefix(line.String(), `{"":"`), "\"}\n")
	for _, value := range []string{string(key), written, strings.Trim(strconv.Quote(string(key)), `"`)} {
		s.addText(found{name, asRawBytes}, value)
	}
}
