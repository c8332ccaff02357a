package people

import (
	"context"
	"errors"
	"fmt"

	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/crypto"
	"maunium.net/go/mautrix/event"
	"maunium.net/go/mautrix/id"
)

// File is a picture or a file that somebody sent as a reply, decrypted.
type File struct {
	EventID  id.EventID
	Sender   id.UserID
	MsgType  event.MessageType
	Name     string
	MimeType string
	Data     []byte
	// Width and Height are a picture's, in pixels, as its sender says.
	Width, Height int
	// Encrypted says that the event came encrypted, and FileEncrypted that what the homeserver keeps is.
	Encrypted, FileEncrypted bool
}

// filesLookedFor is how far back in a room a file is looked for, in events.
const filesLookedFor = 60

// WaitForFile waits until somebody has sent a file, or a picture, as a reply to an event, and downloads it.
func (p *Person) WaitForFile(ctx context.Context, roomID id.RoomID, inReplyTo id.EventID) (*File, error) {
	for {
		p.seenLock.Lock()
		syncs := p.seen.syncs
		p.seenLock.Unlock()
		file, err := p.findFile(ctx, roomID, inReplyTo)
		if err != nil || file != nil {
			return file, err
		}
		what := fmt.Sprintf("a file that replies to %s", inReplyTo)
		if err = p.wait(ctx, what, func(s *seen) bool { return s.syncs > syncs }); err != nil {
			return nil, err
		}
	}
}

func (p *Person) findFile(ctx context.Context, roomID id.RoomID, inReplyTo id.EventID) (*File, error) {
	newest, err := p.Client.Messages(ctx, roomID, "", "", mautrix.DirectionBackward, nil, filesLookedFor)
	if err != nil {
		return nil, fmt.Errorf("%s failed to read %s: %w", p.UserID, roomID, err)
	}
	for _, evt := range newest.Chunk {
		prepare(evt, roomID)
		encrypted := evt.Type == event.EventEncrypted
		if encrypted && evt.Sender != p.UserID {
			p.machineLock.Lock()
			evt, err = p.decrypt(ctx, evt)
			p.machineLock.Unlock()
			if errors.Is(err, crypto.ErrNoSessionFound) {
				continue
			} else if err != nil {
				return nil, fmt.Errorf("%s failed to decrypt an event of %s: %w", p.UserID, roomID, err)
			}
		}
		content, isMessage := evt.Content.Parsed.(*event.MessageEventContent)
		if !isMessage || content.RelatesTo.GetReplyTo() != inReplyTo || content.MsgType != event.MsgFile && content.MsgType != event.MsgImage {
			continue
		}
		return p.download(ctx, evt, content, encrypted)
	}
	return nil, nil
}

func (p *Person) download(ctx context.Context, evt *event.Event, content *event.MessageEventContent, encrypted bool) (*File, error) {
	info := content.GetInfo()
	file := &File{
		EventID: evt.ID, Sender: evt.Sender, MsgType: content.MsgType, Name: content.GetFileName(), MimeType: info.MimeType,
		Width: info.Width, Height: info.Height, Encrypted: encrypted, FileEncrypted: content.File != nil,
	}
	address := content.URL
	if content.File != nil {
		address = content.File.URL
	}
	uri, err := address.Parse()
	if err != nil {
		return nil, fmt.Errorf("the file in %s has no address: %w", evt.ID, err)
	}
	if file.Data, err = p.Client.DownloadBytes(ctx, uri); err != nil {
		return nil, fmt.Errorf("%s failed to download the file in %s: %w", p.UserID, evt.ID, err)
	}
	if content.File != nil {
		if err = content.File.DecryptInPlace(file.Data); err != nil {
			return nil, fmt.Errorf("%s failed to decrypt the file in %s: %w", p.UserID, evt.ID, err)
		}
	}
	return file, nil
}
