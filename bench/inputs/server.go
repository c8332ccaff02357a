package inputs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// Server is the homeserver, as the client's HTTP transport: it answers at once, so that what is measured is the receiver alone.
type Server struct {
	mu sync.Mutex
	// requests counts by the path, without what differs.
	requests map[string]int
	people   map[id.UserID]*Person
	// receiver are the device keys that the receiver has published.
	receiver json.RawMessage
	// oneTimeKeys are the receiver's that nobody has claimed.
	oneTimeKeys []id.Curve25519
	sent        []sentMessages
	// canned is the answer to the next key query, if it was made beforehand.
	canned []byte

	syncs chan json.RawMessage
	// done gets a value whenever the receiver asks for the next /sync.
	done  chan struct{}
	token int
}

// sentMessages is the body of a /sendToDevice.
type sentMessages struct {
	Messages map[id.UserID]map[id.DeviceID]json.RawMessage `json:"messages"`
}

var _ http.RoundTripper = (*Server)(nil)

// NewServer makes a homeserver on which the people have published their keys. The receiver has an account there, too.
func NewServer(receiver *Person, people ...*Person) *Server {
	s := &Server{
		requests: make(map[string]int), people: map[id.UserID]*Person{receiver.UserID: receiver},
		syncs: make(chan json.RawMessage), done: make(chan struct{}, 1),
	}
	for _, p := range people {
		s.people[p.UserID] = p
	}
	return s
}

// Sync has the receiver process one /sync, and returns when it asks for the next: then what it has received is durable.
func (s *Server) Sync(toDevice, timeline []json.RawMessage, roomID id.RoomID) {
	s.SyncBody(s.Body(toDevice, timeline, roomID))
}

// SyncBody is [Server.Sync] with an answer that [Server.Body] has made.
func (s *Server) SyncBody(body json.RawMessage) {
	s.syncs <- body
	<-s.done
}

// AwaitReceiver waits for the first /sync that the receiver asks for.
func (s *Server) AwaitReceiver() { <-s.done }

// Join has the receiver see that it is in an encrypted room with these people, when it processes the answer.
func (s *Server) Join(roomID id.RoomID, members ...*Person) json.RawMessage {
	s.token++
	return rawJSON(object{
		"next_batch": fmt.Sprintf("t%d", s.token), "device_one_time_keys_count": object{"signed_curve25519": 50},
		"rooms": object{"join": joinedRoom(roomID, members)},
	})
}

// joinedRoom is an encrypted room with these members and the receiver, as /sync shows it.
func joinedRoom(roomID id.RoomID, members []*Person) json.RawMessage {
	state := []object{
		{"type": "m.room.create", "content": object{"room_version": "10"}},
		{"type": "m.room.encryption", "content": object{"algorithm": string(id.AlgorithmMegolmV1)}},
		{"type": "m.room.history_visibility", "content": object{"history_visibility": "shared"}},
	}
	for _, userID := range append(usersOf(members), Receiver) {
		state = append(state, object{"type": "m.room.member", "state_key": userID.String(), "sender": userID.String(), "content": object{"membership": "join"}})
	}
	for i, evt := range state {
		evt["event_id"], evt["origin_server_ts"] = fmt.Sprintf("$state%d%s", i, roomID), 1_700_000_000_000
		if evt["state_key"] == nil {
			evt["state_key"], evt["sender"] = "", Receiver.String()
		}
	}
	return rawJSON(object{roomID.String(): object{"state": object{"events": state}}})
}

func usersOf(people []*Person) []id.UserID {
	users := make([]id.UserID, len(people))
	for i, p := range people {
		users[i] = p.UserID
	}
	return users
}

// Body makes a /sync answer. The timeline is of one room.
func (s *Server) Body(toDevice, timeline []json.RawMessage, roomID id.RoomID) json.RawMessage {
	s.token++
	answer := object{
		"next_batch": fmt.Sprintf("t%d", s.token), "device_one_time_keys_count": object{"signed_curve25519": 50},
		"to_device": object{"events": toDevice},
	}
	if roomID != "" {
		answer["rooms"] = object{"join": object{roomID.String(): object{"timeline": object{"events": timeline}}}}
	}
	return rawJSON(answer)
}

// Claim takes one of the receiver's one-time keys.
func (s *Server) Claim() id.Curve25519 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.oneTimeKeys) == 0 {
		panic("the receiver has no one-time keys left")
	}
	claimed := s.oneTimeKeys[0]
	s.oneTimeKeys = s.oneTimeKeys[1:]
	return claimed
}

// Left is how many one-time keys of the receiver nobody has claimed.
func (s *Server) Left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.oneTimeKeys)
}

// Sent takes what the receiver has sent to devices since the last time.
func (s *Server) Sent(to *Device) (contents []json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sent := range s.sent {
		if content := sent.Messages[to.Owner.UserID][to.ID]; content != nil {
			contents = append(contents, content)
		}
	}
	s.sent = nil
	return contents
}

// Requests says how many requests of each kind there were.
func (s *Server) Requests() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	counts := make(map[string]int, len(s.requests))
	for kind, count := range s.requests {
		counts[kind] = count
	}
	return counts
}

// CanAnswer has the next key query answered with what was made beforehand: see [Server.QueryAnswer].
func (s *Server) CanAnswer(body []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.canned = body
}

// NoIdentity has the receiver's account begin without cross-signing keys: it makes its own.
func (s *Server) NoIdentity() {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.people[Receiver]
	p.masterObject, p.selfSigningObject, p.userSigningObject = nil, nil, nil
}

// QueryAnswer makes the answer to a key query about these users.
// https://spec.matrix.org/v1.16/client-server-api/#post_matrixclientv3keysquery
func (s *Server) QueryAnswer(users []id.UserID) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.queryAnswer(users)
}

func (s *Server) queryAnswer(users []id.UserID) []byte {
	devices, masters, selfSigning, userSigning := object{}, object{}, object{}, object{}
	for _, userID := range users {
		p := s.people[userID]
		if p == nil {
			continue
		}
		ofUser := object{}
		for _, device := range p.Devices {
			ofUser[device.ID.String()] = device.keys
		}
		if userID == Receiver && p.userSigningObject != nil {
			userSigning[userID.String()] = p.userSigningObject
		}
		if userID == Receiver && s.receiver != nil {
			ofUser[ReceiverDevice.String()] = s.receiver
		}
		devices[userID.String()] = ofUser
		if p.masterObject != nil {
			masters[userID.String()], selfSigning[userID.String()] = p.masterObject, p.selfSigningObject
		}
	}
	return rawJSON(object{"device_keys": devices, "master_keys": masters, "self_signing_keys": selfSigning, "user_signing_keys": userSigning, "failures": object{}})
}

// UsersPerQuery is how many users the hook and the reference ask for in one request.
const UsersPerQuery = 250

// Query is a key query with its answer, made beforehand.
type Query struct {
	Users  []id.UserID
	Answer []byte
}

// Queries makes the key queries about these people, each with its answer.
func (s *Server) Queries(people []*Person) (queries []Query) {
	for chunk := range slices.Chunk(people, UsersPerQuery) {
		users := usersOf(chunk)
		queries = append(queries, Query{users, s.QueryAnswer(users)})
	}
	return queries
}

// The receiver's account and device.
const (
	Receiver       = id.UserID("@receiver:bench")
	ReceiverDevice = id.DeviceID("RECEIVER")
)

// RoundTrip implements [http.RoundTripper].
func (s *Server) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		var err error
		if body, err = io.ReadAll(req.Body); err != nil {
			return nil, err
		}
	}
	path := strings.TrimPrefix(req.URL.Path, "/_matrix/client/v3/")
	if path == "sync" {
		return s.sync(req)
	}
	answer, err := s.answer(path, body)
	if err != nil {
		return nil, err
	}
	return respond(req, answer), nil
}

func respond(req *http.Request, body []byte) *http.Response {
	return &http.Response{
		StatusCode: http.StatusOK, Request: req, Header: http.Header{"Content-Type": {"application/json"}},
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body)),
	}
}

func (s *Server) sync(req *http.Request) (*http.Response, error) {
	s.done <- struct{}{}
	select {
	case body := <-s.syncs:
		return respond(req, body), nil
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

func (s *Server) answer(path string, body []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kind, _, _ := strings.Cut(path, "/m.")
	s.requests[kind]++
	switch {
	case kind == "keys/query":
		var asked mautrix.ReqQueryKeys
		if err := json.Unmarshal(body, &asked); err != nil {
			return nil, err
		}
		if answer := s.canned; answer != nil {
			s.canned = nil
			return answer, nil
		}
		users := make([]id.UserID, 0, len(asked.DeviceKeys))
		for userID := range asked.DeviceKeys {
			users = append(users, userID)
		}
		return s.queryAnswer(users), nil
	case kind == "keys/upload":
		return s.upload(body)
	case kind == "sendToDevice":
		var sent sentMessages
		err := json.Unmarshal(body, &sent)
		s.sent = append(s.sent, sent)
		return []byte("{}"), err
	case strings.HasSuffix(kind, "/filter"):
		return []byte(`{"filter_id":"1"}`), nil
	case kind == "keys/claim":
		return s.claim(body)
	case kind == "keys/signatures/upload":
		return []byte(`{"failures":{}}`), s.takeSignatures(body)
	}
	return []byte("{}"), nil
}

// claim gives a one-time key of each device that is asked for.
func (s *Server) claim(body []byte) ([]byte, error) {
	var claim mautrix.ReqClaimKeys
	if err := json.Unmarshal(body, &claim); err != nil {
		return nil, err
	}
	claimed := object{}
	for userID, wanted := range claim.OneTimeKeys {
		p := s.people[userID]
		if p == nil {
			continue
		}
		ofUser := object{}
		for _, device := range p.Devices {
			if _, ok := wanted[device.ID]; ok {
				ofUser[device.ID.String()] = device.oneTimeKey()
			}
		}
		claimed[userID.String()] = ofUser
	}
	return rawJSON(object{"one_time_keys": claimed, "failures": object{}}), nil
}

// takeSignatures adds the receiver's signatures to what is published.
func (s *Server) takeSignatures(body []byte) error {
	var upload map[id.UserID]map[string]object
	if err := json.Unmarshal(body, &upload); err != nil {
		return err
	}
	for userID, signed := range upload {
		p := s.people[userID]
		if p == nil {
			continue
		}
		for name, uploaded := range signed {
			switch {
			case userID == Receiver && name == ReceiverDevice.String():
				s.receiver = withSignatures(s.receiver, uploaded)
			case isMasterKey(p.masterObject, name):
				p.masterObject = withSignatures(p.masterObject, uploaded)
			}
		}
	}
	return nil
}

func isMasterKey(published json.RawMessage, name string) bool {
	var key mautrix.CrossSigningKeys
	return json.Unmarshal(published, &key) == nil && key.FirstKey().String() == name
}

// withSignatures adds the signatures of one copy of an object to another.
func withSignatures(published json.RawMessage, uploaded object) json.RawMessage {
	var whole object
	Check(json.Unmarshal(published, &whole))
	signatures, _ := whole["signatures"].(object)
	if signatures == nil {
		signatures = object{}
		whole["signatures"] = signatures
	}
	added, _ := uploaded["signatures"].(object)
	for userID, ofUser := range added {
		known, _ := signatures[userID].(object)
		if known == nil {
			known = object{}
			signatures[userID] = known
		}
		maps.Copy(known, ofUser.(object))
	}
	return rawJSON(whole)
}

// upload takes the receiver's keys, and signs its device with the receiver's self-signing key.
func (s *Server) upload(body []byte) ([]byte, error) {
	var upload struct {
		DeviceKeys  object `json:"device_keys"`
		OneTimeKeys map[string]struct {
			Key id.Curve25519 `json:"key"`
		} `json:"one_time_keys"`
	}
	if err := json.Unmarshal(body, &upload); err != nil {
		return nil, err
	}
	if upload.DeviceKeys != nil {
		if owner := s.people[Receiver]; owner.masterObject != nil {
			sign(upload.DeviceKeys, Receiver, owner.selfSigning.PublicKey().String(), owner.selfSigning)
		}
		s.receiver = rawJSON(upload.DeviceKeys)
	}
	for _, key := range upload.OneTimeKeys {
		s.oneTimeKeys = append(s.oneTimeKeys, key.Key)
	}
	return rawJSON(object{"one_time_key_counts": object{"signed_curve25519": len(s.oneTimeKeys)}}), nil
}
