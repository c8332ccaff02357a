package people

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// annotationKey is the content key by which programs recognise what sendertrust says.
const annotationKey = "dev.sendertrust.annotation"

// Annotation is the machine-readable part of an answer: exactly these keys, those that are not known being absent.
type Annotation struct {
	EventID   id.EventID   `json:"event_id"`
	Code      string       `json:"code"`
	Shield    string       `json:"shield"`
	State     string       `json:"state"`
	UserID    id.UserID    `json:"user_id"`
	DeviceID  id.DeviceID  `json:"device_id"`
	MasterKey id.Ed25519   `json:"master_key"`
	SessionID id.SessionID `json:"session_id"`
	Legacy    bool         `json:"legacy"`
}

// Answer is what a bot said about one event, as it stands after all edits.
type Answer struct {
	EventID       id.EventID
	RoomID        id.RoomID
	Sender        id.UserID
	MsgType       event.MessageType
	Body          string
	FormattedBody string
	// InReplyTo is the event that the answer replies to; Thread is the root of its thread, if there is one.
	InReplyTo id.EventID
	Thread    id.EventID
	// Encrypted says that the answer, and its last edit, came encrypted.
	Encrypted  bool
	Annotation Annotation
	// Malformed says how the annotation differs from its contract; nil when it does not.
	Malformed error
	// Edits counts how often the answer was edited. First is the code that it had before.
	Edits int
	First string
}

// Notice is what a bot said that answers no event.
type Notice struct {
	EventID   id.EventID
	RoomID    id.RoomID
	Sender    id.UserID
	Body      string
	Encrypted bool
}

// Notices gives the notices in a room that have come so far.
func (p *Person) Notices(roomID id.RoomID) (notices []Notice) {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	return p.seen.noticesIn(roomID)
}

func (s *seen) noticesIn(roomID id.RoomID) (notices []Notice) {
	for _, notice := range s.notices {
		if notice.RoomID == roomID {
			notices = append(notices, notice)
		}
	}
	return notices
}

// WaitForNotices waits until the notices in a room are as the caller wants them.
func (p *Person) WaitForNotices(ctx context.Context, roomID id.RoomID, wanted func([]Notice) bool) error {
	return p.wait(ctx, "notices in "+roomID.String(), func(s *seen) bool { return wanted(s.noticesIn(roomID)) })
}

// WaitForNotice waits until there is a notice in the room, and gives the first.
func (p *Person) WaitForNotice(ctx context.Context, roomID id.RoomID) (Notice, error) {
	var found Notice
	err := p.wait(ctx, "a notice in "+roomID.String(), func(s *seen) bool {
		for _, notice := range s.notices {
			if notice.RoomID == roomID {
				found = notice
				return true
			}
		}
		return false
	})
	return found, err
}

// parseAnnotation gives the annotation in a message's content, if there is one.
func parseAnnotation(content json.RawMessage) (annotation Annotation, malformed error, found bool) {
	var outer map[string]json.RawMessage
	if json.Unmarshal(content, &outer) != nil || outer[annotationKey] == nil {
		return annotation, nil, false
	}
	decoder := json.NewDecoder(bytes.NewReader(outer[annotationKey]))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&annotation); err != nil {
		return annotation, fmt.Errorf("the annotation is not as agreed: %w", err), true
	} else if _, err = decoder.Token(); err != io.EOF {
		return annotation, fmt.Errorf("something follows the annotation: %v", err), true
	}
	var fields map[string]any
	if err := json.Unmarshal(outer[annotationKey], &fields); err != nil {
		return annotation, err, true
	}
	for key, value := range fields {
		if value == "" || value == nil {
			return annotation, fmt.Errorf("the annotation has %s, but empty: what is not known must be absent", key), true
		}
	}
	for _, key := range []string{"event_id", "code", "shield", "legacy"} {
		if _, there := fields[key]; !there {
			return annotation, fmt.Errorf("the annotation lacks %s", key), true
		}
	}
	return annotation, nil, true
}

// takeAnswer remembers an event if it is an answer, or the edit of one.
func (s *seen) takeAnswer(evt *event.Event, self id.UserID) {
	if evt.Sender == self || evt.Type.Type != event.EventMessage.Type {
		return
	}
	content, ok := evt.Content.Parsed.(*event.MessageEventContent)
	if !ok {
		return
	}
	if replaced := content.RelatesTo.GetReplaceID(); replaced != "" && content.NewContent != nil {
		var outer struct {
			NewContent json.RawMessage `json:"m.new_content"`
		}
		annotation, malformed, found := Annotation{}, error(nil), false
		if json.Unmarshal(evt.Content.VeryRaw, &outer) == nil {
			annotation, malformed, found = parseAnnotation(outer.NewContent)
		}
		answer := s.answer[replaced]
		if !found || answer == nil || answer.Sender != evt.Sender || answer.RoomID != evt.RoomID {
			return
		}
		answer.MsgType, answer.Body, answer.FormattedBody = content.NewContent.MsgType, content.NewContent.Body, content.NewContent.FormattedBody
		answer.Annotation, answer.Encrypted = annotation, answer.Encrypted && evt.Mautrix.WasEncrypted
		answer.Edits++
		if answer.Malformed == nil {
			answer.Malformed = malformed
		}
		return
	}
	annotation, malformed, found := parseAnnotation(evt.Content.VeryRaw)
	if !found && content.MsgType == event.MsgNotice {
		s.notices = append(s.notices, Notice{evt.ID, evt.RoomID, evt.Sender, content.Body, evt.Mautrix.WasEncrypted})
	}
	if !found || s.answer[evt.ID] != nil {
		return
	}
	answer := &Answer{
		EventID: evt.ID, RoomID: evt.RoomID, Sender: evt.Sender, MsgType: content.MsgType, Body: content.Body, FormattedBody: content.FormattedBody,
		InReplyTo: content.RelatesTo.GetReplyTo(), Thread: content.RelatesTo.GetThreadParent(), Encrypted: evt.Mautrix.WasEncrypted,
		Annotation: annotation, Malformed: malformed, First: annotation.Code,
	}
	s.answer[evt.ID] = answer
	s.answers[annotation.EventID] = append(s.answers[annotation.EventID], answer)
}

// Answers gives the answers to an event that have come so far, in the order in which they came, each with its last edit.
func (p *Person) Answers(eventID id.EventID) []Answer {
	p.seenLock.Lock()
	defer p.seenLock.Unlock()
	return p.seen.answersTo(eventID)
}

func (s *seen) answersTo(eventID id.EventID) []Answer {
	answers := make([]Answer, 0, len(s.answers[eventID]))
	for _, answer := range s.answers[eventID] {
		answers = append(answers, *answer)
	}
	return answers
}

// WaitForAnswer waits until somebody has answered the event, and gives the first answer.
func (p *Person) WaitForAnswer(ctx context.Context, eventID id.EventID) (*Answer, error) {
	return p.WaitForAnswerThat(ctx, eventID, func(Answer) bool { return true })
}

// WaitForAnswerThat waits until some answer to the event, with its edits, is as the caller wants it, and gives that one.
// The error of a wait that ends without it says what answers there were.
func (p *Person) WaitForAnswerThat(ctx context.Context, eventID id.EventID, wanted func(Answer) bool) (*Answer, error) {
	var found *Answer
	err := p.wait(ctx, fmt.Sprintf("an answer to %s", eventID), func(s *seen) bool {
		for _, answer := range s.answersTo(eventID) {
			if wanted(answer) {
				found = &answer
				return true
			}
		}
		return false
	})
	if err != nil {
		codes := []string{}
		for _, answer := range p.Answers(eventID) {
			codes = append(codes, answer.Annotation.Code)
		}
		return nil, fmt.Errorf("%w (answers so far: %q)", err, codes)
	}
	return found, nil
}

// ReadText gives the text of an event in a room, decrypted where need be; it fails when this person has no key for it.
func (p *Person) ReadText(ctx context.Context, roomID id.RoomID, eventID id.EventID) (string, error) {
	evt, err := p.Event(ctx, roomID, eventID)
	if err != nil {
		return "", err
	}
	prepare(evt, roomID)
	if evt.Type == event.EventEncrypted {
		p.machineLock.Lock()
		evt, err = p.decrypt(ctx, evt)
		p.machineLock.Unlock()
		if err != nil {
			return "", fmt.Errorf("%s failed to decrypt %s: %w", p.UserID, eventID, err)
		}
	}
	return evt.Content.AsMessage().Body, nil
}
